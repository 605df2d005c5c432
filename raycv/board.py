"""How far the folds are, between the workers and the live view. Imports nothing heavy: it is an actor of its own."""

from typing import Any


class ProgressBoard:
    """An actor where workers post how far they are and the driver's live view reads it, never in training's way."""

    def __init__(self) -> None:
        self._posts: dict[int, dict[str, Any]] = {}
        self._events: list[tuple[int, str]] = []
        self._errors: dict[int, str] = {}
        self._places: dict[int, Any] = {}
        self._attempts: dict[int, int] = {}

    def post(self, fold: int, post: dict[str, Any]) -> None:
        self._posts.setdefault(fold, {}).update(post)

    def tell(self, fold: int, text: str) -> None:
        self._events.append((fold, text))

    def begin(self, fold: int) -> int:
        """Counts an attempt at a fold, which is beginning. Returns how many there are: they outlive their processes."""
        self._attempts[fold] = self._attempts.get(fold, 0) + 1
        return self._attempts[fold]

    def begun(self, fold: int) -> int:
        """How many attempts at a fold have begun."""
        return self._attempts.get(fold, 0)

    def fail(self, fold: int, message: str) -> None:
        """Why a fold failed, where there was no room to write it down."""
        self._errors[fold] = message

    def error(self, fold: int) -> str | None:
        return self._errors.get(fold)

    def hold(self, fold: int, place: Any) -> None:
        """The placement group that the workers of a fold are in."""
        self._places[fold] = place

    def held(self, fold: int) -> Any:
        """The placement group that a fold held last, and None from then on."""
        return self._places.pop(fold, None)

    def read(self) -> tuple[dict[int, dict[str, Any]], list[tuple[int, str]]]:
        """The latest post of each fold, and the events since the last call."""
        events, self._events = self._events, []
        return self._posts, events

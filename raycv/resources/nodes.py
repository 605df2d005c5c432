"""Compares a node with the driver: the run folder, versions of packages, raycv's code. Faults name the node.

Does not use Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raycv.common.environment import package_version
from raycv.common.locations import WORK, address_of
from raycv.errors import RunFailedError, first_of
from raycv.resources.survey import share_fault, source_hash
from raycv.results.run_folder import RunFolder, resume_command, share_nonce
from raycv.utils import VERSIONS

SHARE_REMEDY = "put run.dir (and a local model.name) on storage that every node sees under the same path"
CODE_REMEDY = (
    "give every node the driver's versions and the driver's raycv: pip install -r requirements.lock, then"
    " pip install --no-deps . in the same checkout (ray job submit --working-dir . sends the checkout to all nodes),"
    " and edit no file of raycv while a run is under way"
)


class NodeError(RunFailedError):
    """A node cannot train a fold of this run. Another node may."""

    def __init__(self, what: str, node: str, *, remedies: Sequence[str] = ()) -> None:
        """`node` is its id in Ray."""
        self.node = node
        super().__init__(what, kind="cluster-node", remedies=remedies)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.node, self.remedies)


def _rebuild(what: str, node: str, remedies: Sequence[str]) -> NodeError:
    return NodeError(what, node, remedies=remedies)


def node_name(address: str, host: str) -> str:
    """The name of a node in messages."""
    return f"node {address} ({host})"


@dataclass(frozen=True)
class Share:
    """The run's folder as one node sees it."""

    file: str
    """the file that holds the nonce"""
    nonce: str
    node: str
    """Ray's id of the node"""
    name: str
    """the name of the node in messages"""

    def check(self) -> None:
        """Raises: NodeError if the node does not see the folder that the driver made. Creates nothing."""
        fault = share_fault(self.file, self.nonce)
        if fault:
            resume = resume_command(RunFolder(Path(self.file).parent))
            raise NodeError(f"{self.name} {fault}.", self.node, remedies=[f"{SHARE_REMEDY}, then: {resume}"])

    def check_base(self, path: Path, ours: Mapping[str, str], found: Mapping[str, str]) -> None:
        """Compares the node's base model with the driver's: a stale copy would train a fold of another model.

        Args:
            path: The folder of the base model on the node.
            ours: The checksum of each file that the driver reads.
            found: The same of the node's files.

        Raises:
            NodeError: A file differs, is missing, or is one that the driver does not have.
        """
        differ = sorted(file for file in {*ours, *found} if ours.get(file) != found.get(file))
        if differ:
            resume = resume_command(RunFolder(Path(self.file).parent))
            which = first_of(differ, 8)
            raise NodeError(
                f"{self.name} has another base model at {path} than the driver; these files differ: {which}.",
                self.node,
                remedies=[f"give that node the driver's files, or remove its copy, then: {resume}"],
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Checks before and after the block writes, because a share may be unmounted meanwhile.

        Raises:
            NodeError: The node does not see the folder. It replaces an error that the block raised.
        """
        self.check()
        try:
            yield
        finally:
            self.check()


@dataclass(frozen=True)
class NodeNeeds:
    """The driver's share, versions and source, for comparison. Travels to trials and workers."""

    share: str
    nonce: str
    versions: Mapping[str, str | None]
    source: str | None
    published: str | None = None
    """the address of the folder of runs in an object storage, if each node has its own copy of the run's folder"""

    @classmethod
    def of(cls, folder: RunFolder) -> "NodeNeeds":
        """The needs of the run in `folder`. Only the driver may call this: it writes a missing nonce."""
        versions, source = _own_code()
        return cls(str(folder.share), share_nonce(folder), versions, source, address_of(folder.root.parent, WORK))

    def question(self, paths: Sequence[str] = ()) -> tuple[str, str, Sequence[str], Sequence[str]]:
        """The arguments of `survey` on a node."""
        return "" if self.published else self.share, self.nonce, tuple(self.versions), paths

    def share_at(self, node: str, name: str) -> Share:
        """The run's folder as the node sees it."""
        return Share(self.share, self.nonce, node, name)

    def compare(self, name: str, found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """All faults of the node `name`, seen from the result `found` of `survey`, and the remedies for them."""
        folder = [found["share"], *(f"does not see {path}" for path in found["missing"])]
        faults = [f"{name} {fault}" for fault in folder if fault]
        remedies = [SHARE_REMEDY] if faults else []
        code = [_differ(package, ours, name, found["versions"][package]) for package, ours in self.versions.items()]
        code.append(_differ("raycv's source", self.source, name, found["source"]))
        differences = [line for line in code if line]
        return faults + differences, remedies + ([CODE_REMEDY] if differences else [])

    def check(self, node: str, name: str, found: Mapping[str, Any]) -> None:
        """Raises: NodeError if the node differs in anything."""
        faults, remedies = self.compare(name, found)
        if faults:
            resume = resume_command(RunFolder(Path(self.share).parent))
            remedies = [*remedies, f"then train the missing folds alone: {resume}"]
            raise NodeError(f"{name} cannot train folds of this run: {'; '.join(faults)}.", node, remedies=remedies)


@cache
def _own_code() -> tuple[dict[str, str | None], str | None]:
    """Versions and source of the driver, as they were at the first call."""
    return {name: package_version(name) for name in ("raycv", *VERSIONS)}, source_hash()


def _differ(what: str, ours: str | None, name: str, theirs: str | None) -> str | None:
    if ours == theirs:
        return None
    return f"{what}: driver {_short(ours)}, {name} {_short(theirs)}"


def _short(value: str | None) -> str:
    return "has none" if value is None else value[:16]

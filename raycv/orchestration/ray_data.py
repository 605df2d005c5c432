"""Ray Data: scores a file of pairs over the cluster, chunk by chunk, in order."""

import logging
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow
import ray.data
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycv.batch_inference.pairs import PairSource, ScoredChunk
from raycv.batch_inference.score_file import Engine, PairScorer, Recipe, score_chunk
from raycv.common.devices import CPU_FOR_INFERENCE, check_given_gpu, check_gpu_before_ray
from raycv.errors import UserError
from raycv.orchestration.cluster import node_resources, ray_cluster

CHUNK, SCORED = "chunk", "scored"


def ray_engine(recipe: Recipe) -> Engine:
    """Scores over the cluster of RAY_ADDRESS or of this machine, or over one that is started for it."""

    on_cpus = recipe.infer.device == "cpu"

    def scored(source: PairSource, done: int) -> Generator[ScoredChunk, None, None]:
        if not on_cpus:
            check_gpu_before_ray(CPU_FOR_INFERENCE)
        with ray_cluster(ray_logs=False), _placed(*scorer_shares(node_resources(), on_cpus=on_cpus)) as placed:
            for row in _dataset(recipe, source, done, placed).iter_rows():
                found = pickle.loads(row[SCORED])
                if isinstance(found, UserError):
                    raise found
                yield found

    return scored


def _dataset(recipe: Recipe, source: PairSource, done: int, placed: Mapping[str, Any]) -> ray.data.Dataset:
    """A row for each chunk, in the order of the file: the pickled ScoredChunk, or the UserError that ends it."""
    # Ray Data logs remarks on progress bars and actors. It raises what fails.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is a chunk: Ray would gather small ones up to 128 MB before it hands any on.
    context.target_max_block_size = 1
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    # Only this machine reads the file: the other nodes need not see it.
    chunks = ray.data.read_datasource(_Chunks(source, done), override_num_blocks=1, num_cpus=0, label_selector=here)
    with warnings.catch_warnings():
        # Ray Data has no other parameter for the scheduling strategy yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return chunks.map_batches(_ChunkScorer, fn_constructor_args=(recipe.load,), batch_size=1, **placed)


@contextmanager
def _placed(scorers: int, cpus: float, gpus: float) -> Iterator[dict[str, Any]]:
    """The options of Ray Data for the scorers. Without GPUs each gets its own node, since each holds a whole model."""
    pool = {"compute": ray.data.ActorPoolStrategy(size=scorers), "num_cpus": cpus, "num_gpus": gpus}
    if gpus:
        yield pool
        return
    group = placement_group([{"CPU": cpus}] * scorers, strategy="STRICT_SPREAD")
    try:
        yield pool | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    finally:
        # On a cluster that this process joined, the group would stay and keep its cores.
        remove_placement_group(group)


def scorer_shares(nodes: Sequence[Mapping[str, float]], *, on_cpus: bool = False) -> tuple[int, float, float]:
    """How many scorers there are, and the cores and GPUs of each.

    Each gets a GPU if there are any, unless the scorers compute `on_cpus`. Otherwise each gets a node, and all get the
    same number of cores: the number of threads decides the last digits of a score. It is the number that
    uses most cores, even if small nodes get no scorer.
    """
    gpus = 0 if on_cpus else int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return gpus, 1, 1
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise UserError(
            "The Ray cluster has neither GPUs nor cores.",
            kind="cluster-resources",
            remedies=["engine=local", "add a node to it"],
        )
    scorers = {each: sum(core >= each for core in cores) for each in cores}
    each = max(scorers, key=lambda each: (each * scorers[each], each))
    return scorers[each], each, 0


class _Chunks(ray.data.Datasource):
    """The chunks of a file after `done` records, pickled, as they are read."""

    def __init__(self, source: PairSource, done: int) -> None:
        super().__init__()
        self._source = source
        self._done = done

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        source, done = self._source, self._done

        def read() -> Iterable[pyarrow.Table]:
            try:
                for chunk in source.chunks(done):
                    yield pyarrow.table({CHUNK: [pickle.dumps(chunk)]})
            except UserError as error:
                yield pyarrow.table({CHUNK: [pickle.dumps(error)]})

        metadata = ray.data.block.BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(read, metadata)]


class _ChunkScorer:
    """An actor with a model, which it loads with the first chunk."""

    def __init__(self, load: Callable[[Callable[[str], None]], PairScorer]) -> None:
        self._load = load
        self._scorer: PairScorer | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        # An error travels as a result: Ray would wrap it, and print the traceback of every actor.
        found = pickle.loads(batch[CHUNK][0])
        if not isinstance(found, UserError):
            try:
                if self._scorer is None and ray.get_gpu_ids():
                    check_given_gpu(CPU_FOR_INFERENCE)
                self._scorer = self._scorer or self._load(lambda text: None)
                found = score_chunk(found, self._scorer)
            except UserError as error:
                found = error
        return {SCORED: [pickle.dumps(found)]}

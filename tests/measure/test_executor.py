"""The executor moves what the plan says, when the schedule says, and nobody reads a page before it is there."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvsim.errors import ConfigError  # noqa: E402
from kvsim.machine.compute import SHAPES as MACHINE_SHAPES  # noqa: E402
from kvsim.measure.bare import SHAPES, Bare, Shape, attention, shape  # noqa: E402
from kvsim.measure.disk import PageFile, Workers  # noqa: E402
from kvsim.measure.executor import Executor, MoveError  # noqa: E402
from kvsim.measure.schedule import Arrivals, Schedule, page_runs, synthetic_moves  # noqa: E402
from kvsim.measure.streams import ALIGNMENT, CudaDevice, open_device  # noqa: E402
from kvsim.plan import HOST, LOAD, SSD, STORE, Moves, Plan, PlanInfo, loads  # noqa: E402

TOY = Shape("toy", 4, 32, 4, 2, 8, 48, 64, 4)
CONTEXT, PAGE, PAGES = 48, 4, 24  # two sequences of 48 tokens
PAGE_BYTES = PAGE * 2 * 2 * 8 * 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    with open_device(request.param) as device:
        yield device


@pytest.fixture(scope="module")
def executor(device, tmp_path_factory):
    with Executor(device, TOY, 2, CONTEXT, PAGE, folder=tmp_path_factory.mktemp("ssd")) as executor:
        yield executor


def moves(*rows):
    """Moves of one layer from (page, tier, action)."""
    page, tier, action = np.array(sorted(rows), int).reshape(-1, 3).T
    return Moves(page.astype(np.int32), tier.astype(np.int8), action.astype(np.int8))


SOME = [loads([0, 1, 2, 7]), loads([]), loads([23]), loads([4, 6, 8])]
MIXED = [
    moves((0, HOST, LOAD), (1, SSD, LOAD), (2, SSD, LOAD), (9, HOST, STORE)),
    loads([3, 4, 11], SSD),
    moves((5, SSD, STORE), (6, SSD, STORE)),
    loads(range(PAGES)),
]
SCHEDULES = [Schedule(*how) for how in itertools.product((1, 2, 9), ("start", "layer"), ("runs", "page"))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.depth}-{s.known}-{s.method}")
@pytest.mark.parametrize("step", [SOME, MIXED], ids=["host", "mixed"])
def test_poisoned_pages_come_back_and_the_output_is_the_same(executor, step, schedule):
    found = executor.check(step, schedule)
    assert found.ok
    assert found.pages == sum(len(m.page) for m in step)


def test_a_page_that_the_plan_forgets_is_noticed(executor):
    absent = [np.array([0, 1]), np.array([], int), np.array([23]), np.array([], int)]
    found = executor.check([loads([0]), *SOME[1:]], absent=absent)
    assert not found.same_output and not found.ok
    assert executor.check(SOME).ok  # nothing of it is left


def test_a_copy_that_brings_something_else_is_noticed(executor, monkeypatch):
    def spoiled(number, m, schedule, real=executor._prepare_layer):
        layer = real(number, m, schedule)
        layer.loads = [(to, source.roll(4)) for to, source in layer.loads]
        return layer

    monkeypatch.setattr(executor, "_prepare_layer", spoiled)
    found = executor.check([loads([2, 5]), *[loads([])] * 3])
    assert found.wrong == [(0, 2), (0, 5)] and not found.same_output
    with pytest.raises(MoveError, match="2 of 2 pages came out wrong"):
        executor.run([[loads([2, 5]), *[loads([])] * 3]], steps=1)
    monkeypatch.undo()
    assert executor.check(SOME).ok


def test_a_lost_store_is_noticed(executor, monkeypatch):
    step = [moves((3, HOST, STORE)), *[loads([])] * 3]
    assert executor.check(step).ok
    real = executor._prepare_layer

    def lost(*arguments):
        layer = real(*arguments)
        layer.stores = []
        return layer

    monkeypatch.setattr(executor, "_prepare_layer", lost)
    assert executor.check(step).wrong == [(0, 3)]
    monkeypatch.undo()
    assert executor.check(step).ok


@pytest.mark.parametrize(
    ("method", "copies", "stored"),
    [("runs", [2, 0, 1, 3], [0, 1, 0, 2]), ("page", [4, 0, 1, 3], [0, 2, 0, 2])],
)
def test_copies_and_bytes_are_those_counted_by_hand(executor, method, copies, stored):
    step = list(SOME)
    step[1] = moves((8, HOST, STORE), (9, SSD, STORE))
    step[3] = moves((4, HOST, LOAD), (6, HOST, LOAD), (8, HOST, LOAD), (4, HOST, STORE), (7, HOST, STORE))
    times = executor.step(step, Schedule(method=method))
    assert times.copies.tolist() == copies
    assert times.bytes.tolist() == [n * PAGE_BYTES for n in (4, 0, 1, 3)]
    assert times.stored_copies.tolist() == stored
    assert times.stored_bytes.tolist() == [n * PAGE_BYTES for n in (0, 2, 0, 2)]


def test_a_page_written_to_host_and_ssd_crosses_the_link_once(executor):
    times = executor.step([moves((5, HOST, STORE), (5, SSD, STORE)), *[loads([])] * 3])
    assert times.stored_bytes.tolist() == [PAGE_BYTES, 0, 0, 0]


def test_long_runs_are_read_from_the_ssd_in_pieces(executor, monkeypatch):
    monkeypatch.setattr("kvsim.measure.executor.READ_BYTES", 5 * PAGE_BYTES)
    times = executor.step([loads(range(12), SSD), *[loads([])] * 3])
    assert times.copies.tolist() == [3, 0, 0, 0]
    assert times.bytes.tolist() == [12 * PAGE_BYTES, 0, 0, 0]
    assert executor.check([loads(range(12), SSD), *[loads([])] * 3]).ok


# -- order, by stamps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [HOST, SSD])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_copies_wait_for_the_layer_a_staging_depth_before(executor, depth, tier):
    for _ in range(5):
        t = executor.step([loads(range(PAGES), tier)] * 4, Schedule(depth))
        assert (t.copy_start_s[depth:] >= t.layer_end_s[:-depth]).all()
        assert (t.copy_end_s >= t.copy_start_s).all() and (t.layer_end_s >= t.copy_end_s).all()
        assert (np.diff(t.layer_end_s) >= 0).all()


@pytest.mark.parametrize("tier", [HOST, SSD])
def test_on_demand_a_copy_waits_for_the_layer_before(executor, tier):
    for _ in range(5):
        t = executor.step([loads([1, 2], tier), loads([1]), loads([]), loads([3], tier)], Schedule(3, "layer"))
        assert t.copy_start_s[1] >= t.layer_end_s[0] and t.copy_start_s[3] >= t.layer_end_s[2]
        assert np.isnan(t.copy_start_s).tolist() == np.isnan(t.copy_end_s).tolist() == [False, False, True, False]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_depth_allows_is_copied_while_a_layer_computes(executor, monkeypatch, depth):
    """Layer 0 goes on only once the copies that may overtake it have done so."""
    if executor.device.kind != "cpu":
        pytest.skip("a graph cannot be held up")
    first, came = executor._layers[0], []

    def held():
        came.extend(executor._loaded[n].mark.happened.wait(10) for n in range(depth))
        first()

    monkeypatch.setattr(executor, "_layers", [held, *executor._layers[1:]])
    t = executor.step([loads([1])] * 4, Schedule(depth))
    assert came == [True] * depth
    assert (t.copy_end_s < t.layer_end_s[0]).tolist() == [n < depth for n in range(4)]


def test_write_backs_hold_up_neither_the_step_nor_the_next(executor, monkeypatch):
    if executor.device.kind != "cpu":
        pytest.skip("a stream cannot be held up")
    hold = threading.Event()
    executor.device.write_back.submit(lambda: hold.wait(10))
    step = [moves((3, HOST, STORE), (4, HOST, LOAD)), *[loads([])] * 3]
    ready = executor._prepare(step, Schedule())
    for _ in range(2):
        executor._perform(ready, Schedule())
    assert not hold.is_set()
    hold.set()
    executor.synchronize()


def test_what_goes_wrong_in_a_stream_or_a_reader_is_raised(executor, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(executor._disk, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor.step([loads([1, 2], SSD)] * 4)
    if executor.device.kind == "cpu":
        with monkeypatch.context() as patch:
            patch.setattr(executor, "_layers", [lambda: 1 / 0, *executor._layers[1:]])
            with pytest.raises(ZeroDivisionError):
                executor.step(SOME)
    assert executor.check(MIXED).ok


def test_a_copy_that_the_device_refuses_holds_nobody_up(executor, monkeypatch):
    """As on a lost device: the step fails, though the thread that submits its layers waits for the readers."""
    real = Arrivals._submit

    def refused(self, read, arrived):
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Arrivals, "_submit", refused)
        with pytest.raises(RuntimeError, match="the device is lost"):
            executor.step([loads([1, 2], SSD)] * 4)
    assert Arrivals._submit is real and executor.check(MIXED).ok


# -- the SSD's file ----------------------------------------------------------------------------------------------


def test_pages_of_any_size_are_read_and_written_where_they_belong(tmp_path):
    regions = [np.random.default_rng(i).integers(0, 256, 10_000, np.uint8) for i in range(3)]
    file = PageFile(regions, tmp_path)
    assert not list(tmp_path.iterdir())  # the file has no name any more
    file.write(1, 5_000, memoryview(bytes(range(100))))
    regions[1][5_000:5_100] = range(100)
    for layer, start, stop in ((0, 0, 10_000), (1, 4_990, 5_110), (2, 4_096, 8_192), (2, 9_999, 10_000)):
        offset, length, skip = file.span(layer, start, stop)
        assert offset % ALIGNMENT == length % ALIGNMENT == 0
        raw = np.empty(length + ALIGNMENT, np.uint8)
        piece = raw[(shift := -raw.ctypes.data % ALIGNMENT) : shift + length]
        file.read(offset, piece.data)
        assert (piece[skip : skip + stop - start] == regions[layer][start:stop]).all()
    file.close()


def test_without_direct_reads_the_file_works_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(PageFile, "_open_direct", lambda self, name: None)
    region = np.arange(ALIGNMENT, dtype=np.uint8)
    file = PageFile([region], tmp_path)
    assert not file.direct
    into = np.empty(ALIGNMENT, np.uint8)
    file.read(0, into.data)
    assert (into == region).all()
    file.close()


def test_a_folder_that_cannot_hold_the_pages(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the pages"):
        PageFile([np.zeros(8, np.uint8)], tmp_path / "none")


def test_what_is_stored_on_the_ssd_is_loaded_from_there(executor):
    layer, page = 2, 7
    part = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
    before = executor._kv[layer][part].clone()
    executor._kv[layer][part] = torch.arange(PAGE_BYTES, device=before.device).to(torch.uint8) % 60
    wanted = executor._kv[layer][part].clone()
    executor.synchronize()
    executor.step([loads([]), loads([]), moves((page, SSD, STORE)), loads([])])
    executor._kv[layer][part] = 0
    executor.synchronize()
    executor.step([loads([]), loads([]), loads([page], SSD), loads([])])
    assert executor._kv[layer][part].equal(wanted)
    executor._kv[layer][part] = before
    executor._refresh_twins()


def test_workers_raise_the_first_error_and_go_on():
    workers, done = Workers(2), []
    workers.put(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workers.synchronize()
    workers.put(lambda: done.append(1))
    workers.synchronize()
    workers.close()
    assert done == [1]


# -- rows --------------------------------------------------------------------------------------------------------


def test_a_row_has_what_the_format_asks_for(executor):
    row = executor.run_synthetic(0.5, Schedule(3, "start", "page"), clustered=False, steps=4, warm_up=1, note="x")
    p = row.pop("params")
    assert {k: len(v) for k, v in row.items() if k.endswith("ms")} == {"ms": 4, "gpu_ms": 4, "layer_ms": 4}
    assert (row["phase"], row["kind"]) == ("offload", "executor")
    assert p["shape"] == {
        "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48, "vocab": 64,
        "value_bytes": 4,
    }  # fmt: skip
    assert p["fetched_pages"] == p["copies"] == [12.0] * 4
    named = (
        "impl",
        "model",
        "sequences",
        "context",
        "page",
        "tier",
        "method",
        "known",
        "depth",
        "resident",
        "clustered",
    )
    assert [p[k] for k in named] == ["executor", "toy", 2, 48, 4, "host", "page", "start", 3, 0.5, False]
    assert (p["plan"], p["policy"], p["note"], p["checked_pages"]) == (None, None, "x", 48)
    assert all(math.isfinite(x) and x > 0 for x in row["ms"] + row["gpu_ms"] + row["layer_ms"])


def test_rows_of_other_phases(executor):
    resident = executor.run_synthetic(1.0, variants=1, steps=2)
    assert (resident["phase"], resident["params"]["tier"], resident["params"]["graph"]) == ("resident", None, "layer")
    whole = executor.run_whole(steps=2, warm_up=0)
    assert (whole["phase"], whole["params"]["graph"], whole["layer_ms"]) == ("resident", "step", [])
    ssd = executor.run_synthetic(0.75, tier=SSD, steps=2)
    assert (ssd["phase"], ssd["params"]["tier"], ssd["params"]["ssd_pages"]) == ("ssd", "ssd", [6.0] * 4)
    assert ssd["params"]["direct"] in (True, False)


def test_rows_fit_the_log(executor, tmp_path):
    from kvsim.measure.rows import RowLog, read_rows

    with RowLog(tmp_path / "rows.jsonl") as log:
        log.add("toy/offload/x", **executor.run_synthetic(0.5, steps=2))
        log.add("toy/resident/x", **executor.run_whole(steps=2))
    assert len(read_rows([tmp_path / "rows.jsonl"])) == 2


def toy_plan(**given):
    """Two layers of three pages; every step loads page 1 of layer 0, and from step 6 on stores page 2 of layer 1."""
    rows = [row for s in range(10) for row in ((s, 0, 1, HOST, LOAD), *([(s, 1, 2, HOST, STORE)] if s > 5 else []))]
    facts = {"page_size": PAGE, "page_bytes": 64, "layers": 2, "kv_heads": 1, "head_dim": 2, "context": 12, "steps": 10}
    info = PlanInfo(**{"trace": "t", "trace_name": "toy", "policy": "lru", "budget": "2", **facts, **given})
    return Plan(info, dict(zip(("step", "layer", "page", "tier", "action"), np.array(rows).T, strict=True)))


def test_an_exported_plan_is_run_on_the_executors_geometry(executor):
    plan = toy_plan()
    row = executor.run_plan(plan, steps=4, warm_up=2)
    p = row["params"]
    assert p["fetched_pages"] == [8.0, 8.0, 0.0, 0.0]  # 24 pages are eight times three
    assert p["stored_pages"] == [0.0, 0.0, 8.0, 8.0]
    assert (p["plan"], p["policy"], p["first_step"]) == (plan.fingerprint, "lru", 6)
    assert p["mapped"]["repeated"] == 8.0
    assert p["resident"] == pytest.approx(1 - 4 / 24)
    early = executor.run_plan(plan, first=0, steps=2, warm_up=1)["params"]
    assert early["first_step"] == 1 and "stored_pages" not in early


def test_a_plan_that_does_not_fit_is_refused(executor):
    with pytest.raises(ConfigError, match="pages of 8 tokens, the executor of 4"):
        executor.run_plan(toy_plan(page_size=8, context=24))
    with pytest.raises(ConfigError, match="the plan has 10 steps; 25 from step"):
        executor.run_plan(toy_plan())
    with pytest.raises(ConfigError, match="moves of 1 layers"):
        executor.step([loads([])])
    with pytest.raises(ConfigError, match="beyond the model's 24"):
        executor.step([loads([24])] * 4)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"known": "later"}, {"method": "bulk"}])
def test_a_schedule_that_does_not_exist(wrong):
    with pytest.raises(ConfigError):
        Schedule(**wrong)


def test_a_context_in_whole_pages(device):
    with pytest.raises(ConfigError, match="no whole number of pages"):
        Executor(device, TOY, 1, 50, 4)


# -- small parts -------------------------------------------------------------------------------------------------


def test_runs_of_neighbours():
    pages = np.array([0, 1, 2, 3, 4, 7, 9, 10])
    assert page_runs(pages) == [(0, 5), (7, 8), (9, 11)]
    assert page_runs(pages, 2) == [(0, 2), (2, 4), (4, 5), (7, 8), (9, 11)]
    assert page_runs(pages, 1) == [(p, p + 1) for p in pages]
    assert page_runs(np.array([], int)) == []


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("resident", [0.0, 0.3, 0.99, 1.0])
def test_made_up_steps_load_what_they_are_asked_to(clustered, resident):
    step = synthetic_moves(3, 100, resident, clustered=clustered, seed=4, tier=SSD)
    assert [len(m.pages(LOAD, SSD)) for m in step] == [round(100 * (1 - resident))] * 3
    assert all((np.diff(m.page) > 0).all() for m in step)
    again = synthetic_moves(3, 100, resident, clustered=clustered, seed=4)
    assert all((a.page == b.page).all() for a, b in zip(step, again, strict=True))


def test_clusters_are_fewer_runs_and_layers_differ():
    near, far = (synthetic_moves(8, 512, 0.75, clustered=c) for c in (True, False))
    assert max(len(page_runs(m.page)) for m in near) <= 16 < min(len(page_runs(m.page)) for m in far)
    assert len({m.page.tobytes() for m in near}) == 8


def test_attention_is_that_of_separate_heads():
    kv, q = torch.randn(2, 40, 2, 2, 8), torch.randn(2, 4, 8)
    wanted = torch.empty(2, 4, 8)
    for b in range(2):
        for head in range(4):
            k, v = kv[b, :, 0, head // 2], kv[b, :, 1, head // 2]
            wanted[b, head] = torch.softmax(k @ q[b, head] / 8**0.5, 0) @ v
    assert (attention(q, kv) - wanted.view(2, -1)).abs().max() < 1e-5


def test_a_step_is_that_of_a_llama(device):
    """One layer and the head, from transformers with the same weights and the same cache."""
    transformers = pytest.importorskip("transformers")
    from transformers.cache_utils import DynamicCache

    one = Shape("one", 1, 32, 4, 2, 8, 48, 64, 4)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, tie_word_embeddings=True, rms_norm_eps=torch.finfo(torch.float32).eps,
    )  # fmt: skip
    model, bare = transformers.LlamaForCausalLM(config).to(device.place).eval(), Bare(one, 2, CONTEXT, device.place)
    w, layer = bare._layers[0], model.model.layers[0]
    with torch.no_grad():
        model.lm_head.weight.copy_(bare._head)
        q, k, v = w["qkv"].split([32, 16, 16])
        gate, up = w["up"].chunk(2)
        attn, mlp = layer.self_attn, layer.mlp
        pairs = [(attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v), (attn.o_proj, w["o"])]
        for linear, values in [*pairs, (mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, w["down"])]:
            linear.weight.copy_(values)
        cache, past = DynamicCache(config=config), bare._by_sequence(0)[:, :-1]
        cache.update(past[:, :, 0].transpose(1, 2).clone(), past[:, :, 1].transpose(1, 2).clone(), 0)
        wanted = model(input_ids=bare.token[:, None].clone(), past_key_values=cache, use_cache=True).logits[:, -1]
    bare.step()
    assert (bare.logits - wanted).abs().max() < 1e-4
    assert bare.token.equal(wanted.argmax(-1))


def test_the_shapes_are_those_of_the_machine_model():
    for name, there in MACHINE_SHAPES.items():
        here = SHAPES[name]
        assert here.token_bytes == there.kv_token_bytes
        assert here.sizes == {key: getattr(there, key) for key in here.sizes}
    with pytest.raises(ConfigError, match='unknown shape "gpt"'):
        shape("gpt")


def test_devices_that_do_not_exist():
    with pytest.raises(ConfigError, match='unknown device "tpu"'):
        open_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            open_device("cuda")


def test_events_of_a_cpu_mean_what_those_of_cuda_do():
    """A wait holds for the recording made before it, not for a later one; an event never recorded holds nobody up."""
    with open_device("cpu") as device:
        event, hold, order = device.event(), threading.Event(), []
        device.copy.wait(event)
        event.record(device.compute)
        device.copy.wait(event)
        device.copy.submit(lambda: order.append("copy"))
        device.compute.submit(lambda: hold.wait(10))
        event.record(device.compute)
        device.copy.synchronize()
        assert order == ["copy"] and not hold.is_set()
        hold.set()
        device.synchronize()


def test_attention_is_not_that_of_cudnn_while_a_cuda_device_is_open(monkeypatch):
    stubs = {"current_device": lambda: 0, "get_device_name": lambda place: "a GPU", "Stream": lambda **_: None}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with CudaDevice() as device:
        assert device.name == "a GPU" and not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch):
    """A graph holds addresses: memory freed before it is replayed would be somebody else's."""

    class Graph:
        def replay(self):
            pass

    nothing = SimpleNamespace(wait_stream=lambda stream: None)
    stubs = {
        "Stream": lambda **_: nothing, "current_stream": lambda: nothing, "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None, "graph_pool_handle": lambda: None, "CUDAGraph": Graph,
        "graph": lambda graph, **_: nullcontext(),
    }  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    buffer = torch.ones(1)
    alive = weakref.ref(buffer)
    (replay,) = CudaDevice.compiled(CudaDevice.__new__(CudaDevice), [partial(buffer.add_, 1.0)])
    del buffer
    assert alive() is not None
    del replay
    assert alive() is None


def test_importing_loads_no_torch():
    code = "import sys, kvsim.measure.executor; print('torch' in sys.modules, 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2

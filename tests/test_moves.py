"""The exported plan says what the run counted, and a run that has none is refused."""

import numpy as np
import pytest

from kvsim.errors import ConfigError, KvsimError
from kvsim.plan import read_plan
from kvsim.simulate import run
from kvsim.trace.access import Geometry, dense_trace

from .conftest import SIZES, random_source

BASE = {"regime": "offload", "demand": "topk(6)", "page_size": 2, "budget": "40%", "granularity": "layer"}


@pytest.fixture
def trace():
    return dense_trace([random_source(3)], Geometry(2, 2, 2, 16, **SIZES))


def counted(plan, action, tier):
    """Moves per step of one kind."""
    chosen = (plan.columns["action"] == ("load", "store", "drop").index(action)) & (plan.columns["tier"] == tier)
    return np.bincount(plan.columns["step"][chosen], minlength=plan.info.steps)


@pytest.mark.parametrize("policy", ["lru", "h2o(recent=4)", "belady"])
def test_loads_and_stores_are_those_of_the_steps(trace, tmp_path, policy):
    result = run(trace, policy=policy, export_plan=tmp_path / "p.parquet", **BASE)
    plan, steps = read_plan(tmp_path / "p.parquet"), result.steps.sort_values("step")
    plan.require(trace.fingerprint)
    page = plan.info.page_bytes
    assert page == 2 * 2 * 2 * 16 * SIZES.get("kv_bytes", 2.0)  # tokens, K and V, heads, values
    assert (counted(plan, "load", 1) * page == steps["fetched_host_bytes"]).all() and counted(plan, "load", 1).any()
    assert (counted(plan, "store", 1) * page == steps["spilled_host_bytes"]).all()
    held = np.cumsum(np.diff(steps["resident_pages"], prepend=0))
    assert (held == steps["resident_pages"]).all()
    assert plan.info.steps == 21 and plan.info.context == 44 and plan.info.policy == policy


def test_a_plan_can_be_followed(trace, tmp_path):
    """Only what is not on the GPU is loaded, only what is there is dropped."""
    run(trace, policy="lru", export_plan=tmp_path / "p.parquet", **BASE)
    plan = read_plan(tmp_path / "p.parquet")
    on = [set(range(12)) for _ in range(2)]  # the prompt's pages
    for step in range(plan.info.steps):
        for layer, moves in enumerate(plan.step(step)):
            new = {(24 + step - 1) // 2} if step else set()
            on[layer] |= new
            load, drop = (set(moves.pages(action, 1).tolist()) for action in (0, 2))
            assert not load & on[layer]
            on[layer] |= load
            assert drop <= on[layer]
            on[layer] -= drop
            assert len(on[layer]) <= 8  # 40 % of 22 pages


def test_one_decision_for_all_layers_moves_the_pages_of_each(trace, tmp_path):
    result = run(trace, policy="lru", export_plan=tmp_path / "p.parquet", **{**BASE, "granularity": "token"})
    plan = read_plan(tmp_path / "p.parquet")
    first, second = plan.step(12)
    assert len(first.page) and (first.page == second.page).all()
    assert counted(plan, "load", 1).sum() * plan.info.page_bytes == result.steps["fetched_host_bytes"].sum()


def test_a_prefetch_is_a_load_of_the_next_step(trace, tmp_path):
    plug = tmp_path / "ahead.py"
    plug.write_text(
        "import numpy as np\nfrom kvsim import offload\n\n\n@offload('ahead')\nclass Ahead:\n    'Heaviest first.'\n\n"
        "    def place(self, view, victims):\n        return np.int8(1)\n\n    def prefetch(self, view):\n"
        "        away = np.where(view.resident | (view.key < 0), -np.inf, view.mass)\n"
        "        return away == away.max(-1, keepdims=True)\n"
    )
    settings = {**BASE, "policy": "random", "offload": str(plug), "demand": "theta(0.05)", "page_size": 1}
    settings["budget"] = "12"
    steps = run(trace, export_plan=tmp_path / "p.parquet", **settings).steps.sort_values("step")
    sent = np.append(0, steps["prefetched_host_bytes"].to_numpy()[:-1])
    plan = read_plan(tmp_path / "p.parquet")
    assert sent.any()
    assert (counted(plan, "load", 1) * plan.info.page_bytes == steps["fetched_host_bytes"] + sent).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "lru"}, "a lossy run moves nothing"),
        ({**BASE, "granularity": None}, "granularity layer"),
    ],
)
def test_what_is_no_plan_is_refused(trace, tmp_path, settings, said):
    with pytest.raises(ConfigError) as bad:
        run(trace, export_plan=tmp_path / "p.parquet", **settings)
    assert said in str(bad.value) and not list(tmp_path.iterdir())


def test_one_request_makes_a_plan(tmp_path):
    two = dense_trace([random_source(1), random_source(2)], Geometry(2, 2, 2, 16, **SIZES))
    with pytest.raises(ConfigError, match="a plan is of one request, the run has 2"):
        run(two, export_plan=tmp_path / "p.parquet", **BASE)
    run(two, export_plan=tmp_path / "p.parquet", requests=[2], **BASE)
    assert read_plan(tmp_path / "p.parquet").info.trace == two.only([2]).fingerprint


def test_a_run_that_fails_leaves_no_plan(trace, tmp_path):
    plug = tmp_path / "bad.py"
    plug.write_text(
        "from kvsim import policy\n\n\n@policy('bad')\nclass Bad:\n    'Breaks in step 10.'\n\n"
        "    def score(self, view):\n        return view.last * (float('nan') if view.now == 10 else 1)\n"
    )
    with pytest.raises(KvsimError, match="NaN"):
        run(trace, policy=str(plug), export_plan=tmp_path / "p.parquet", **BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.py"] or not list(tmp_path.glob("*.parquet"))

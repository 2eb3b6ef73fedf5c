"""Spec strings, and the ways a policy comes to be known."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import warnings
from dataclasses import fields
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from kvsim import registry
from kvsim.config import run_config
from kvsim.errors import ConfigError, PolicyError
from kvsim.manifest import identify
from kvsim.registry import Spec, build, find, parse_spec
from kvsim.replay import prepare
from kvsim.simulate import run
from kvsim.trace.access import dense_trace
from tests.policies.test_readset import random_trace

SOURCE = """
from kvsim.registry import offload, policy

@policy("{name}")
class Mine:
    '''One of mine.'''
    size: int = {size}

    def score(self, view):
        return view.key
"""


@pytest.fixture(autouse=True)
def table():
    """Names registered by a test are gone after it."""
    registry.load_all()
    before = dict(registry._TABLE)
    yield
    registry._TABLE.clear()
    registry._TABLE.update(before)


def write(path, text, **values):
    path.write_text(textwrap.dedent(text.format(**values) if values else text))
    return path


# -- spec strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("h2o", Spec("h2o")),
        (" h2o ", Spec("h2o")),
        ("h2o()", Spec("h2o")),
        ("h2o(recent=64)", Spec("h2o", {"recent": 64})),
        ("h2o(recent='50%', sink=-1)", Spec("h2o", {"recent": "50%", "sink": -1})),
        ("a/b.py:C(x=[1, 2.5], y={'k': None}, z=True)", Spec("a/b.py:C", {"x": [1, 2.5], "y": {"k": None}, "z": True})),
    ],
)
def test_parse(text, spec):
    assert parse_spec(text) == spec
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    "inside",
    [
        "(64)",
        "(*x)",
        "(**{'a': 1})",
        "(recent=64",
        "(recent=64))",
        "(recent=open('x'))",
        "(recent=__import__('os').getpid())",
        "(recent=a)",
        "(recent=1, recent=2)",
        "(recent=1)(sink=2)",
        "(recent=1).real(sink=2)",
        "(recent=1) + g(sink=2)",
        "(a={}={})",
        "(x=" + "-" * 5000 + "1)",
        "(x={[]: 1})",
        "(x='\x00')",
    ],
)
def test_what_is_not_a_literal_is_refused_and_never_run(inside):
    with pytest.raises(PolicyError, match="cannot read"):
        parse_spec("h2o" + inside)


def test_unknown_names_and_parameters():
    with pytest.raises(PolicyError, match='unknown policy "h20"') as caught:
        build("h20")
    assert 'did you mean "h2o"?' in caught.value.hint
    with pytest.raises(PolicyError, match='unknown offload "spil"'):
        build("spil", "offload")
    with pytest.raises(PolicyError, match='no parameter "recnt"') as caught:
        build("h2o(recnt=3)")
    assert "recent" in caught.value.hint and caught.value.where == "h2o(recnt=3)"


def test_build_makes_a_fresh_object():
    a, b = build("streaming-llm(sink=2)"), build("streaming-llm")
    assert a is not b and (a.sink, b.sink) == (2, 4)
    assert {"fifo", "lru", "h2o", "belady"} <= set(registry.names())
    assert "spill" in registry.names("offload")


# -- registration ------------------------------------------------------------------------------------------------


def test_the_decorator_fills_in_what_is_optional():
    @registry.policy("plain")
    class Plain:
        recent: int | str = 7

        def score(self, view):
            return view.key

    p = build("plain(protect_head=0.1)")
    assert {f.name: getattr(p, f.name) for f in fields(p)} == {
        "recent": 7,
        "sink": 0,
        "protect_head": 0.1,
        "protect_tail": 0.0,
    }
    assert (p.batch, p.lag, p.granularity, p.rows, p.columns) == (1, 1, "head", "visible", {})


def test_a_subclass_keeps_the_defaults_it_inherits():
    @registry.policy("longer-sink")
    class Longer(find("streaming-llm")):
        pass

    assert build("longer-sink").sink == 4


def test_names_are_taken_once():
    def make():
        class First:
            def score(self, view):
                return 0

        return First

    registry.policy("twice")(make())
    registry.policy("twice")(make())  # the same place in the same module: a notebook cell run again
    with pytest.raises(PolicyError, match='two policy classes are called "twice"'):
        registry.policy("twice")(type("Second", (), {"score": lambda self, view: 0}))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "neither score"),
        ({"score": 3}, "neither score"),
        ({"score": len, "__annotations__": {"size": "int"}}, 'parameter "size" of policy "odd" has no default'),
        ({"score": len, "__annotations__": {"size": "list"}, "size": []}, "do not work: mutable default"),
    ],
)
def test_classes_that_are_no_policy(body, words):
    with pytest.raises(PolicyError, match=words):
        registry.policy("odd")(type("Odd", (), body))
    assert "odd" not in registry.names()


def test_a_hook_that_the_engine_does_not_call_is_refused(monkeypatch):
    """A misspelt one would change nothing and say nothing; what begins with _ is the author's own."""
    monkeypatch.setattr(registry, "_TABLE", {})

    def with_method(name):
        methods = {"place": lambda self, view, victims: 1, name: lambda self, view: None}
        return registry.offload("odd")(type("Odd", (), methods))

    with pytest.raises(PolicyError, match='offload policy "odd": the engine does not call prefech') as caught:
        with_method("prefech")
    assert "place, prefetch, backup, rebuild" in caught.value.hint
    assert with_method("_heat").spec_name == "odd"


def test_an_offload_policy_needs_place():
    with pytest.raises(PolicyError, match="no place"):
        registry.offload("odd")(type("Odd", (), {}))


# -- files and modules -------------------------------------------------------------------------------------------


def test_a_file_is_a_policy(tmp_path):
    path = write(tmp_path / "mine.py", SOURCE, name="mine", size=3)
    assert build(f"{path}").size == build(f"{path}:Mine").size == 3
    assert build(f"{path}(size=4)").size == 4
    assert find(str(path)) is find(str(path))


def test_an_edited_file_is_read_again(tmp_path):
    path = write(tmp_path / "mine.py", SOURCE, name="mine", size=3)
    old = build(str(path))
    write(path, SOURCE, name="mine", size=5)
    assert (build(str(path)).size, old.size) == (5, 3)


def test_an_edit_of_the_same_length_in_the_same_second_is_seen(tmp_path, monkeypatch):
    """Which bytecode files do not tell apart."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for size in (3, 5, 3):
        path = write(tmp_path / "mine.py", SOURCE, name="mine", size=size)
        os.utime(path, (10**9, 10**9))
        assert build(str(path)).size == size


@pytest.mark.parametrize("spec", ["{}", "whitelist(inner='{}')", "offload"])
def test_a_run_is_of_the_text_that_it_began_with(trace, tmp_path, spec):
    """Edited after its first request, of three; the next run sees it."""
    victims = "from kvsim import offload\n\n@offload('own')\nclass Own:\n    def place(self, view, victims):\n"
    scores = "from kvsim import policy\n\n@policy('own')\nclass Own:\n    size: int = 1\n    def score(self, view):\n"
    text, old, new = (victims, 1, 2) if spec == "offload" else (scores, "view.key", "-view.key")
    path = write(tmp_path / "own.py", text + f"        return {old}\n")
    keys = {"budget": "30%", "page_size": 1, "regime": "offload"}
    keys |= {"offload": str(path)} if spec == "offload" else {"policy": spec.format(path)}
    calm, seen = run(trace, **keys), []

    def edit(done, total):
        seen.append(done)
        write(path, text.replace("size: int = 1", "size: int = 2") + f"        return {new}\n")

    edited, after = run(trace, **keys, progress=edit), run(trace, **keys)
    assert seen[0] < 20 < seen[-1]
    assert edited.id == calm.id != after.id and repr(edited.manifest) == repr(calm.manifest)
    assert edited.steps.equals(calm.steps) and not after.steps.equals(calm.steps)


DATA = {  # spec of a policy that reads a file, what the file holds, what it holds after an edit
    "layer-budgets(budgets='{}')": ([1, 9], [9, 1]),
    "duo-attention(heads='{}')": ([[0, 0]], [[1, 0], [1, 1]]),
    "flexicache(unstable='{}')": ([[0, 0]], [[1, 1]]),
    "attention-gate(scores='{}')": ("random", "alternating"),
}


def save(path, data):
    """As JSON, or random gates or every second one."""
    if isinstance(data, str):
        random = np.random.default_rng(0).random((2, 2, 50))
        np.save(path.open("wb"), random if data == "random" else np.broadcast_to(np.arange(50) % 2, random.shape))
    else:
        path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("spec", DATA)
def test_a_run_is_of_the_data_that_it_began_with(tmp_path, spec):
    """Edited after its first request, of three; the next run sees it."""
    (before, later), path = DATA[spec], tmp_path / "data"
    trace = dense_trace([random_trace(i).sources[0] for i in range(3)], random_trace().geometry)
    keys = {"policy": spec.format(save(path, before)), "budget": "30%", "page_size": 1, "regime": "offload"}
    calm, seen = run(trace, **keys), []

    def edit(done, total):
        seen.append(done)
        save(path, later)

    edited, after = run(trace, **keys, progress=edit), run(trace, **keys)
    assert seen[0] < 30 < seen[-1]
    assert edited.id == calm.id != after.id and repr(edited.manifest) == repr(calm.manifest)
    assert edited.steps.equals(calm.steps) and not after.steps.equals(calm.steps)


@pytest.mark.parametrize("spec", DATA)
def test_a_run_is_called_by_the_data_that_it_uses(tmp_path, spec):
    """Edited after a policy has read it, and before it is known what the run is to be called."""
    (before, later), path = DATA[spec], tmp_path / "data"
    trace, keys = random_trace(), {"policy": spec.format(path), "budget": "30%", "page_size": 1, "regime": "offload"}

    def named(data):
        save(path, data)
        setting = prepare(trace, run_config(keys))
        save(path, later)
        assert list(setting.texts) == [path.resolve()]
        return identify(setting)["source"]

    save(path, before)
    calm = identify(prepare(trace, run_config(keys)))["source"]
    assert named(before) == calm != named(later)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "data", "one")
    with registry.reading({}):
        assert registry.read(path) == b"one"
        write(path, "two")
        assert registry.read("data") == registry.read(str(path)) == registry.read("./data") == b"one"
        with pytest.raises(FileNotFoundError):
            registry.read("other")
        write(tmp_path / "other", "there now")
        assert registry.read("other") == b"there now"
    assert registry.read("data") == b"two"  # without a reading, what it holds now
    write(path, "three")
    assert registry.read("data") == b"three"


@pytest.mark.parametrize("spec", ["{}.py", *DATA])
def test_a_link_that_goes_in_a_circle_is_no_file(tmp_path, spec):
    spec = spec.format(place := tmp_path / "circle")
    for link in (place, place.with_suffix(".py")):
        link.symlink_to(link)
    with pytest.raises((PolicyError, ConfigError), match="no file|cannot read"):
        build(spec)


def test_a_reading_is_of_the_texts_that_it_began_with(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.py", SOURCE, name="mine", size=3)
    outer, text = f"whitelist(inner='{path}')", path.read_bytes()
    texts = {}
    with registry.reading(texts):
        first = build(str(path))
    hashed = registry.source_hash(first)
    write(path, SOURCE, name="mine", size=5)
    assert build(str(path)).size == build(outer).policy.size == 5
    with registry.reading(texts):
        monkeypatch.chdir(tmp_path)
        assert [build(spec).size for spec in (str(path), f"{path}:Mine", "mine.py")] == [3, 3, 3]
        assert build(outer).policy.size == 3
        with registry.reading({}):
            assert build(str(path)).size == 5
        assert registry.source_hash(build(str(path))) == hashed == registry.source_hash(first)
        path.unlink()
        assert build(str(path)).size == 3
    assert texts == {path.resolve(): text}
    with pytest.raises(PolicyError, match="no file"):
        build(str(path))


@pytest.mark.parametrize(
    ("text", "spec", "words"),
    [
        ("", "", r"holds 0 policy classes \(none\)"),
        ("x = 1 +", "", "does not import: SyntaxError"),
        ("import no_such_module_at_all", "", "does not import: ModuleNotFoundError"),
        ("raise ValueError('why')", "", "does not import: ValueError: why"),
        (
            SOURCE.format(name="a", size=1) + SOURCE.format(name="b", size=1).replace("Mine", "Other"),
            "",
            r"holds 2 policy classes \(Mine, Other\)",
        ),
        (SOURCE.format(name="a", size=1), ":Nobody", "is not a registered policy"),
        (SOURCE.format(name="a", size=1), ":policy", "is not a registered policy"),
        (SOURCE.format(name="a", size=1).replace("= 1", ""), "", 'parameter "size" of policy "a" has no default'),
    ],
)
def test_files_that_hold_no_policy(tmp_path, text, spec, words):
    path = write(tmp_path / "mine.py", text)
    for _ in range(2):  # the second time it is said again
        with pytest.raises(PolicyError, match=words):
            build(f"{path}{spec}")


def test_a_missing_file():
    with pytest.raises(PolicyError, match='no file "nowhere.py"'):
        build("nowhere.py")


def test_modules(tmp_path, monkeypatch):
    write(tmp_path / "my_package.py", SOURCE, name="packaged", size=2)
    write(tmp_path / "my_broken.py", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert build("my_package:Mine(size=9)").size == 9
    assert build("packaged").size == 2
    with pytest.raises(PolicyError, match='cannot import "my_broken": ZeroDivisionError'):
        build("my_broken:Mine")
    with pytest.raises(PolicyError, match='cannot import "no.such"'):
        build("no.such")


def test_entry_points(tmp_path, monkeypatch):
    """An installed plug-in is found by name; one that does not import is named in a warning and harms nobody."""
    write(tmp_path / "plug_good.py", SOURCE, name="plugged", size=6)
    write(tmp_path / "plug_bad.py", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint(n, f"plug_{n}", "kvsim.plugins") for n in ("bad", "good")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "kvsim.plugins" else [])
    monkeypatch.setattr(registry, "_LOADED", set())
    with pytest.warns(UserWarning, match='plug-in "bad" is left out: cannot import "plug_bad"'):
        assert build("plugged").size == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "plugged" in registry.names()  # said once


def test_source_hash_follows_the_file(tmp_path):
    path = write(tmp_path / "mine.py", SOURCE, name="mine", size=3)
    first = registry.source_hash(build(str(path)))
    assert first == registry.source_hash(build(str(path)))
    write(path, SOURCE, name="mine", size=4)
    assert registry.source_hash(build(str(path))) != first

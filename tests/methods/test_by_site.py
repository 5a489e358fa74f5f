"""Fields that differ by site: what a key means, what counts, and every way an adapter goes afterwards."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import peftree
import zoo
from methods.tools import near, run, shaken
from peftree import registry
from peftree.errors import ConfigError, MethodError, PeftreeError, SiteError
from peftree.methods.bysite import hooked
from peftree.methods.contract import Deltas, Field, Method, Place
from peftree.named_method import make_method
from peftree.plan import plan
from peftree.plan.question import request
from peftree.settings import load_config

MIXED: dict[str, Any] = {"sites": "attn.q attn.v ffn.*", "r": {"attn.q": 5, "ffn": 2}, "alpha": {"*": 3.0, "ffn": 7.0}}


def ranks(adapter: Any) -> dict[str, int]:
    """Return the rank at every key of a LoRA adapter."""
    return {key.rpartition("/")[0].removeprefix("model.layers."): d.A.shape[0] for key, d in adapter.deltas.items()}


def dense(adapter: Any, alphas: dict[str, float]) -> Tensor:
    """Return the output of the plain base with `W + alpha / r B A` written into its weights."""
    model = zoo.build("llama")
    for key, d in adapter.deltas.items():
        path, _, role = key.rpartition("/")
        alpha = next((a for part, a in alphas.items() if part in role), 3.0)
        model.get_submodule(path).weight.data += alpha / d.A.shape[0] * d.B.detach().t() @ d.A.detach()
    return run("llama", model)


def test_every_site_gets_the_values_of_the_keys_that_mean_it() -> None:
    model, adapter = shaken("llama", "lora", **MIXED)
    got = {k.partition(".")[2]: r for k, r in ranks(adapter).items()}
    assert got == {
        "self_attn.q_proj": 5, "self_attn.v_proj": 8,
        "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 2,
    }  # fmt: skip
    near(run("llama", model), dense(adapter, {"ffn": 7.0}), run("llama", zoo.build("llama")))


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"*": 3}, [3, 3, 3, 3]),
        ({"attn.*": 4}, [4, 4, 4, 4]),
        ({"attn": 4, "attn.v@1": 2}, [4, 4, 4, 2]),
        ({"attn.v@1": 2, "attn": 4}, [4, 4, 4, 4]),
        ({"model.layers.1": 6}, [8, 8, 6, 6]),
        ({"layers.1 model.layers.0.self_attn.v_proj": 6, "*": 1}, [1, 6, 6, 6]),
        ({"v_proj": 2, "layer@0": 5}, [5, 5, 8, 2]),
    ],
)
def test_the_last_key_counts(keys: dict[str, int], wanted: list[int]) -> None:
    adapter = peftree.adapt(zoo.build("llama"), "lora", r=keys)
    assert list(ranks(adapter).values()) == wanted


def test_slices_of_a_fused_projection_are_apart() -> None:
    adapter = peftree.adapt(zoo.build("gpt2"), "lora", r={"attn.q": 3})
    assert [d.A.shape[0] for d in adapter.deltas.values()] == [3, 8] * 2


BAD: list[tuple[str, dict[str, Any], type[PeftreeError], str]] = [
    ("lora", {"r": {"attn.q": 0}}, ConfigError, "r='0' at 'attn.q'.*greater"),
    ("lora", {"r": {"attn.q": True}}, ConfigError, "must be a number"),
    ("lora", {"r": {"nope": 3}}, SiteError, "r: No site matches 'nope'"),
    ("lora", {"r": {"attn.o": 3}}, SiteError, "not one of the adapter's sites"),
    ("lora", {"lr_ratio": {"attn.q": 3}}, ConfigError, r"param_groups\(\)"),
    ("lora", {"by_site": {"sites": {"attn.q": "x"}}}, ConfigError, "sites cannot differ by site.*r, alpha, dropout"),
    ("adalora", {"r": {"attn.q": 3}}, ConfigError, r"schedule\(\)"),
    ("adalora", {"orthogonal": {"attn.q": 0.1}}, ConfigError, r"aux_loss\(\)"),
    ("eva", {"tau": {"attn.q": 0.5}}, ConfigError, r"init\(\)"),  # under a decorator
    ("fishmask", {"share": {"attn.q": 0.3}}, MethodError, "whose fields differ"),
    ("mam", {"by_site": {"r": {"attn.q": 3}}}, ConfigError, "no by_site of its own"),
    *[("lora", {name: True}, ConfigError, f"{name}=True: it must be a number") for name in ("r", "alpha", "dropout")],
    ("prefix_tuning", {"length": False}, ConfigError, "length=False: it must be a number"),
]


@pytest.mark.parametrize(("method", "fields", "error", "words"), BAD)
def test_what_cannot_differ_is_refused_by_name(
    method: str, fields: dict[str, Any], error: type[PeftreeError], words: str
) -> None:
    model = zoo.build("llama")
    with pytest.raises(error, match=words):
        peftree.adapt(model, method, **fields)
    assert not peftree.adapters(model)


def test_switches_stay_switches() -> None:
    assert peftree.adapt(zoo.build("llama"), "lora", rank_stabilized={"attn.q": True}).deltas
    with pytest.raises(PeftreeError):
        peftree.adapt(zoo.build("llama"), "lora", seed=True)


def test_it_goes_where_adapters_go(tmp_path: Path) -> None:
    model, adapter = shaken("llama", "lora", **MIXED)
    wanted = run("llama", model)
    assert registry.from_spec(registry.spec(adapter.method)) == adapter.method
    assert pickle.loads(pickle.dumps(adapter.method)) == adapter.method
    near(run("llama", copy.deepcopy(model)), wanted)
    folder = peftree.save(adapter, tmp_path / "a", format="native")
    other = zoo.build("llama")
    peftree.load(other, folder, name="again")
    assert torch.equal(run("llama", other), wanted)
    peftree.load(other, folder, name="b")
    near(run_routed(other, ["again", None, None]), wanted[:1])
    for how in ("effects", "weights"):
        peftree.combine(other, {"again": 0.5, "b": 0.5}, name=how, how=how)
        near(run("llama", other), wanted)
    peftree.merge(model)
    near(run("llama", model), wanted)


def run_routed(model: Any, rows: list[str | None]) -> Tensor:
    """Return the first row of a batch routed so."""
    with peftree.route(model, rows):
        return run("llama", model)[:1]


def test_an_adaptive_method_trains_with_values_by_site() -> None:
    model, adapter = shaken("llama", "adalora", target_r=2, warmup=0, final=0, interval=1, alpha={"attn.q": 4.0})
    for step in range(4):
        loss = model(**zoo.batch("llama")).loss + adapter.aux_loss()
        loss.backward()
        adapter.step(step, 4)
    assert sum(int(d.alive.sum()) for d in adapter.deltas.values()) < 12 * 4


def test_it_is_written_in_runs_and_plans(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nmethod:\n  name: lora\n  r: {attn.q: 16, attn.v@0: 4}\n")
    by_file = make_method(load_config(path))
    by_flag = make_method(load_config(None, ["model=m", "data=d", "r={attn.q: 16, attn.v@0: 4}"]))
    assert by_file == by_flag == registry.make("lora", {"r": {"attn.q": 16, "attn.v@0": 4}})
    path.write_text("model: m\ndata: d\nmethod:\n  name: lora\n  r: {attn.q: 0}\n")
    with pytest.raises(ConfigError, match=r"run.yaml:5: lora: r='0' at 'attn.q'"):
        make_method(load_config(path))


def test_a_part_of_a_recipe_has_its_own() -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, "mam", parallel_adapter={"size": {"*": 6, "ffn@1": 3}}, prefix_tuning={"hidden": 0})
    sizes = [d.down.shape[0] for k, d in adapter.deltas.items() if k.endswith("ffn")]
    assert sizes == [6, 3]


def test_the_planner_counts_them(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.config.save_pretrained(tmp_path)
    adapter = peftree.adapt(model, "lora", **MIXED)
    found = plan(
        request(model=str(tmp_path), method={"name": "lora", "fields": MIXED}, max_length=8, task="generation")
    )
    assert found.trainable == sum(p.numel() for p in adapter.parameters())


def test_a_field_that_a_hook_reads_by_a_way_round_is_one_for_all() -> None:
    """By a property, by another of its methods, or within a function of its own."""

    class Told(Method):
        name: ClassVar[str] = "told"
        one: float = Field(1.0, description="by a property")
        two: float = Field(1.0, description="by a method")
        three: float = Field(1.0, description="within")
        four: float = Field(1.0, description="by build alone")

        @property
        def twice(self) -> float:
            return 2 * self.one

        def more(self) -> float:
            return self.two

        def build(self, place: Place) -> Any:
            return self.four

        def schedule(self, deltas: Deltas, moment: Any) -> None:
            assert [self.twice, self.more(), *(x * self.three for x in (1, 2))]

    assert hooked(Told) == dict.fromkeys(("one", "two", "three"), "schedule")

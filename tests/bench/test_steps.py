"""What the benchmarks of a step share."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trimtab.bench.steps import Stepper, apart, chunked_loss, kept_from, own_loss, trained
from trimtab.bench.synthetic import FAMILIES, QUICK


def test_costs_from_a_process_of_their_own_are_kept(tmp_path: Path) -> None:
    """The script's last line is the answer; a file of answers spares the second process."""
    script, known = tmp_path / "script.py", tmp_path / "known.json"
    script.write_text("import sys\nprint('by the way')\nprint('{\"given\": %d}' % len(sys.argv[1]))\n")
    assert apart(script, ["four"]) == {"given": 4}
    assert apart(script, ["four"], known) == {"given": 4}
    assert apart(script, ["seven 7"], known) == {"given": 7}
    script.unlink()
    assert apart(script, ["four"], known) == {"given": 4}
    today = datetime.date.today().isoformat()
    assert kept_from(known) == f"costs kept in known.json are from {today}\n"
    assert kept_from(tmp_path / "none.json") == kept_from(None) == ""

    kept = json.loads(known.read_text())
    assert list(kept) == ["four", "seven 7"]
    kept["four"] |= {"torch": "1.0", "date": "2020-01-02"}
    known.write_text(json.dumps(kept))
    assert kept_from(known) == f"costs kept in known.json are from 2020-01-02 to {today}\n"
    with pytest.raises(RuntimeError, match=r"script\.py"):  # of another torch, and the script is gone
        apart(script, ["four"], known)
    assert apart(script, ["seven 7"], known) == {"given": 7}


def test_step_does_what_it_is_given() -> None:
    """The extra loss adds its gradient and not its value, and what comes after a step is told its number."""
    layer = nn.Linear(3, 1, bias=False)
    told: list[int] = []
    extra: list[Tensor] = []

    def more() -> Tensor:
        extra.append(100.0 * layer.weight.sum())
        return extra[-1]

    stepper = Stepper(
        lambda: layer.weight.square().sum(), trained(layer), extra=more, after=lambda step, _: told.append(step)
    )
    before = layer.weight.detach().clone()
    assert stepper.step() == pytest.approx(float(before.square().sum()))
    torch.testing.assert_close(layer.weight.grad, 2 * before + 100.0)
    stepper.step()
    assert told == [1, 2]
    assert len(extra) == 2
    assert (layer.weight < before).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_models_and_batches_fit(name: str) -> None:
    """Every family's model computes its own loss of its batch, and where it has words the chunked loss equals it."""
    family = FAMILIES[name]
    model, batch = family.model(QUICK).eval(), family.batch(QUICK)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    arguments, labels = family.arguments(batch)
    own = own_loss(model, **arguments, labels=labels)()
    assert own.isfinite()
    if name != "bert":  # T5 computes its loss in bf16
        torch.testing.assert_close(chunked_loss(model, batch)(), own.float(), rtol=4e-3, atol=0.0)

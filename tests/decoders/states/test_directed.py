"""What decoders that read directions share: recorded steps, rows that are left alone, files that do not fit."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import NEUTRAL, PICTURES, STRONG, Forced, batch_of, close, logits, plain, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.decoding.test_graphs import scores
from vlmfix.decoders import parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.heads.directions.kept import save_directions
from vlmfix.heads.directions.measure import MEASURED
from vlmfix.models.checkpoint import DIRECTIONS

NAMES = tuple(MEASURED)


@pytest.fixture
def recording():
    with recording_on_cpu([vlm_of("llava")]) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_give_the_scores_of_others(name, recording, monkeypatch):
    vlm, method = vlm_of("llava"), parse(f"{STRONG[name]}+vcd:plausibility=0")
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        recorded, others = (scores(vlm, method, monkeypatch, recorded=yes, shown=shown) for yes in (True, False))
        for one, other in zip(recorded, others, strict=True):
            close(one, other, 1e-3)
    assert len(recording) == 2


@pytest.mark.parametrize("name", NAMES)
def test_contrast_rows_and_samples_without_a_picture_are_left_alone(name):
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello there"], [PICTURES[0], ()])
    close(logits(vlm, batch, STRONG[name])[:, 1], plain(vlm, batch)[:, 1])
    tokens = torch.arange(20, 26).view(2, 3)

    def said(spec):
        return logits(vlm, batch, spec, logits_processor=[Forced(tokens, batch.length)])[:, 0]

    turned = "vti:text=6,image=0" if name == "vti" else STRONG[name]  # the tower turns noised pictures as well
    vcd = "vcd:contrast=1,plausibility=0"
    noisy = 2 * said("greedy") - said(vcd)
    close(said(f"{turned}+{vcd}"), 2 * said(turned) - noisy, 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_without_directions_of_this_model_it_says_how_to_measure_them(name, tmp_path):
    vlm, other, file = vlm_of("llava"), vlm_of("llava", seed=1), tmp_path / DIRECTIONS
    save_directions({name: directions_for(other, name, None)}, file)
    method = parse(f"{name}:profile={file}")
    assert method.check(other) is None
    assert "other weights" in method.check(vlm)
    with pytest.raises(IncompatibleDecodersError, match=rf"{name} cannot act: .*other weights"):
        logits(vlm, batch_of(vlm), method)
    assert f"vlmfix profile --model llava --directions {name}" in parse(f"{name}:profile={tmp_path}/no").check(vlm)
    facts = method.facts(other)
    assert facts["directions"] == f"{name} in {DIRECTIONS}"
    assert facts["directions_digest"].startswith("sha256:")
    assert parse(NEUTRAL[name]).facts(vlm) == {}
    assert parse(method.spec()) == method


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_other_methods_directions_is_refused(name, tmp_path):
    vlm, file = vlm_of("llava"), tmp_path / DIRECTIONS
    other = NAMES[NAMES.index(name) - 1]
    save_directions({other: directions_for(vlm, other, None)}, file)
    reason = parse(f"{name}:profile={file}").check(vlm)
    assert f"{name} reads its own directions, and {file} holds those for {other}" in reason

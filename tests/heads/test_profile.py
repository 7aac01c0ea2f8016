from __future__ import annotations

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.contracts.support import picture, vlm_of
from tests.tiny import tiny_vlm
from tests.tiny.llava import build
from vlmfix.errors import DataError, ProfileMismatchError, UsageError
from vlmfix.generation import VLM
from vlmfix.heads import measure
from vlmfix.heads.agreement import agreement
from vlmfix.heads.measure import profile
from vlmfix.heads.plot import draw
from vlmfix.heads.profile import TOLERANCE, HeadProfile, fingerprint, load_profiles, save_profiles
from vlmfix.heads.profiler import Profiler, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(Profiler):
    """Scores that a test makes up: fixed ones plus noise of a size."""

    name = "made"
    title = "made up"
    noise: float = 0.0

    def begin(self, vlm):
        return MadeState(self.noise)


class MadeState(State):
    shares = False

    def __init__(self, noise):
        self.noise = noise

    def scores(self, work, ran):
        fixed = torch.arange(work.layers * work.heads).view(work.layers, work.heads).flip(0) * 1.0
        rows = [torch.Generator().manual_seed(work.first + row) for row in range(work.batch.rows)]
        return torch.stack([fixed + self.noise * torch.randn(fixed.shape, generator=row) for row in rows])


class MadeToo(Made):
    name = "made too"


PICTURE = picture(1, (24, 24))


def made(**options):
    count = options.pop("count", 3)
    return profile(vlm_of("llava"), [PICTURE] * count, [Made(**options)])["made"]


def test_a_file_gives_back_what_was_saved(tmp_path):
    vlm = vlm_of("llava")
    before = profile(vlm, [PICTURE, picture(2, (40, 30))], ["vhd", "ablation"], seed=7)
    save_profiles(before, tmp_path / "heads.safetensors")
    after = load_profiles(tmp_path / "heads.safetensors")
    assert list(after) == ["vhd", "ablation"]
    for name, part in after.items():
        assert part.card == before[name].card
        assert torch.equal(part.scores, before[name].scores)
        assert torch.equal(part.stderr, before[name].stderr)
        assert part.details.keys() == before[name].details.keys()
        part.check(vlm)
    card = after["ablation"].card
    assert (card.pictures, card.seed, card.layers, card.heads, card.model_type) == (2, 7, 3, 8, "llava")
    assert card.parameters == {"copies": 32, "target": "next-token"}
    assert card.versions["torch"] == torch.__version__.split("+")[0]
    with pytest.raises(DataError, match="vhd, ablation"):
        HeadProfile.load(tmp_path / "heads.safetensors")
    assert HeadProfile.load(tmp_path / "heads.safetensors", "vhd").card == card.__class__(
        **{**dataclasses.asdict(before["vhd"].card)}
    )


def test_the_digest_is_of_the_pictures_in_their_order():
    vlm, other = vlm_of("llava"), picture(2, (24, 24))
    digests = [profile(vlm, shown, [Made()])["made"].card.data for shown in ([PICTURE], [other], [PICTURE, other])]
    again = profile(vlm, [PICTURE.copy(), other], [Made()], batch_size=1)["made"].card.data
    assert len(set(digests)) == 3
    assert again == digests[2]


@pytest.mark.parametrize("content", [b"", b"no profile", b"other", None])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    elif content == b"other":
        save_file({"x": torch.zeros(1)}, path, metadata={"vlmfix": "[]"})
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match="no profile"):
        load_profiles(path)
    with pytest.raises(DataError, match="cannot read"):
        load_profiles(tmp_path / "missing")


def test_top_is_deterministic():
    found = made()
    assert found.top(3) == ((0, 7), (0, 6), (0, 5))
    level = HeadProfile(torch.zeros(2, 3), torch.zeros(2, 3), found.card, found.fingerprint)
    assert level.top(4) == ((0, 0), (0, 1), (0, 2), (1, 0))
    assert level.top(0) == ()
    with pytest.raises(UsageError, match="count=7"):
        level.top(7)


def test_another_model_is_refused():
    found = made()
    found.check(vlm_of("llava"))
    for other, reason in ((tiny_vlm("qwen2_vl"), "model type"), (tiny_vlm("llava", seed=1), "other weights")):
        with pytest.raises(ProfileMismatchError, match=reason):
            found.check(other)
    for field in ("layers", "heads"):
        changed = dataclasses.replace(found, card=dataclasses.replace(found.card, **{field: 99}))
        with pytest.raises(ProfileMismatchError, match=f"{field} 99"):
            changed.check(vlm_of("llava"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_accepted(dtype):
    found = made()
    tiny = build("llava", 0)
    found.check(VLM(tiny.model.to(dtype), tiny.processor, tiny.family, "elsewhere"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patching_in_half_precision_ranks_like_float32(dtype):
    shown = [picture(1, (40, 60)), picture(2, (66, 40)), picture(3, (50, 50))]
    tiny = build("llava", 0)
    half = VLM(tiny.model.to(dtype), tiny.processor, tiny.family, "half")
    exact, rough = (profile(vlm, shown, ["patching"], question="is the 7 red?") for vlm in (vlm_of("llava"), half))
    assert agreement(rough["patching"], exact["patching"]).correlation > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_like_float32(dtype):
    names = ["vhd", "image-mass", "gaze-shift", "sinks"]
    exact = profile(vlm_of("llava"), [PICTURE], names)
    tiny = build("llava", 0)
    half = VLM(tiny.model.to(dtype), tiny.processor, tiny.family, "half")
    for name, part in profile(half, [PICTURE], [*names, "ablation", "localization", "retrieval"]).items():
        assert bool(part.scores.isfinite().all())
        if name in exact:
            assert agreement(part, exact[name]).correlation > 0.97


def test_a_stable_ranking_ends_the_profile(monkeypatch):
    monkeypatch.setattr(measure, "LOOK_EVERY", 4)
    assert (made(count=40).card.pictures, made(count=40).card.stable) == (8, True)
    noisy = made(count=40, noise=100.0)
    assert (noisy.card.pictures, noisy.card.stable) == (40, False)
    whole = profile(vlm_of("llava"), [PICTURE] * 12, [Made()], until_stable=False)["made"]
    assert whole.card.pictures == 12
    assert whole.card.reliability == pytest.approx(1)


@pytest.mark.parametrize("order", [1, -1])
def test_one_unstable_ranking_keeps_all_profilers_going(monkeypatch, order):
    monkeypatch.setattr(measure, "LOOK_EVERY", 4)
    found = profile(vlm_of("llava"), [PICTURE] * 40, [Made(), MadeToo(noise=100.0)][::order])
    assert {name: (part.card.pictures, part.card.stable) for name, part in found.items()} == {
        "made": (40, False),
        "made too": (40, False),
    }


def test_pictures_are_taken_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(measure, "LOOK_EVERY", 4)
    taken = []

    def pictures():
        for number in range(1000):
            taken.append(number)
            yield PICTURE

    done = []
    profile(vlm_of("llava"), pictures(), [Made()], batch_size=2, report=done.append)
    assert len(taken) == 8
    assert done == [2, 4, 6, 8]


def test_wrong_use_is_refused():
    vlm = vlm_of("llava")
    with pytest.raises(DataError, match="no picture"):
        profile(vlm, [], [Made()])
    with pytest.raises(UsageError, match="unknown profiler 'nothing'"):
        profile(vlm, [PICTURE], ["nothing"])
    with pytest.raises(UsageError, match="named twice"):
        profile(vlm, [PICTURE], ["vhd", "vhd"])
    with pytest.raises(UsageError, match="batch_size=0"):
        profile(vlm, [PICTURE], ["vhd"], batch_size=0)
    with pytest.raises(UsageError, match="cannot share a file"):
        save_profiles({}, "heads.safetensors")


def test_agreement():
    found = made()
    same = agreement(found, made(noise=0.001), count=5)
    assert (same.count, same.overlap) == (5, 1.0)
    assert same.correlation == pytest.approx(1, abs=1e-3)
    reversed_ = dataclasses.replace(found, scores=-found.scores)
    assert (same.shared, 0 < same.p < 1e-3) == (found.top(5), True)
    opposite = agreement(found, reversed_, count=50)
    assert (opposite.count, opposite.overlap, opposite.chance, opposite.p) == (12, 0.0, 0.5, 1.0)
    whole = agreement(found, reversed_, count=5, either_sign=True)
    assert (whole.overlap, whole.p) == (1.0, pytest.approx(1 / math.comb(24, 5)))
    assert opposite.correlation == pytest.approx(-1)
    with pytest.raises(ProfileMismatchError, match="2 layers of 8 heads"):
        agreement(found, dataclasses.replace(found, scores=found.scores[:2]))


def test_the_plot_is_written(tmp_path):
    found = made(noise=1.0)
    draw([found, dataclasses.replace(found, scores=-found.scores)], tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 5_000
    with pytest.raises(DataError, match="cannot write"):
        draw([found], tmp_path / "heads.txt")


KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_with_other_matrices_of_one_kind_is_another(kind):
    """As fine-tuned ones are: adapters of some projections, merged."""
    layers = [nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in KINDS}) for _ in range(32)]
    decoder = nn.ModuleDict({"embed": nn.Embedding(8, 4), "layers": nn.ModuleList(layers)})
    vlm = SimpleNamespace(model=decoder, family=SimpleNamespace(decoder=lambda model: model))
    before = fingerprint(vlm)
    for layer in layers:
        layer[kind].weight.data += 0.1
    assert not torch.allclose(fingerprint(vlm), before, TOLERANCE, 1e-6)


NAN, INF = float("nan"), float("inf")


def spoiled(path, tensor=None, card=None):
    """A file of one profile, in which a tensor or the card was changed."""
    save_profiles({"made": made(noise=1.0)}, path)
    with safe_open(path, framework="pt") as file:
        about, tensors = json.loads(file.metadata()["vlmfix"]), {key: file.get_tensor(key) for key in file.keys()}
    if tensor is not None:
        tensor(tensors)
    if card is not None:
        card(about["profiles"])
    save_file(tensors, path, metadata={"vlmfix": json.dumps(about)})
    return path


def changed(name, change):
    return lambda held: held.update({name: change(held[name])})


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (changed("made/scores", lambda t: torch.full_like(t, NAN)), "made/scores holds values that are no numbers"),
        (changed("made/scores", lambda t: t.index_fill(0, torch.tensor([1]), INF)), "made/scores holds values"),
        (changed("made/scores", lambda t: torch.zeros(3, 3)), r"made/scores has the shape \(3, 3\), not \(3, 8\)"),
        (changed("made/scores", lambda t: torch.zeros(3)), "made/scores has the shape"),
        (changed("made/scores", lambda t: torch.zeros(0, 8)), "made/scores has the shape"),
        (changed("made/scores", lambda t: t.double()), "made/scores is of float64, not float32"),
        (changed("made/scores", lambda t: t.long()), "made/scores is of int64"),
        (changed("made/stderr", lambda t: torch.full_like(t, NAN)), "made/stderr holds values"),
        (changed("made/stderr", lambda t: -t - 1), "made/stderr holds numbers below 0"),
        (changed("made/stderr", lambda t: t.half()), "made/stderr is of float16"),
        (changed("fingerprint", lambda t: torch.full_like(t, NAN)), "fingerprint holds values"),
        (changed("fingerprint", lambda t: t[None]), "fingerprint has the shape"),
        (changed("fingerprint", lambda t: t.int()), "fingerprint is of int32"),
        (lambda held: held.pop("made/scores"), "it has no made/scores"),
        (lambda held: held.pop("made/stderr"), "it has no made/stderr"),
        (lambda held: held.pop("fingerprint"), "no fingerprint"),
        (lambda held: held.update({"made/more": torch.zeros(1)}), "holds made/more"),
        (lambda held: held.update({"other/scores": torch.zeros(1)}), "tensors of other, and no card"),
        (lambda held: held.update({"made/details/x": torch.tensor([INF])}), "made/details/x holds other values"),
        (lambda held: held.update({"made/details/x": torch.tensor([True])}), "made/details/x holds other values"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, tensor, said):
    with pytest.raises(DataError, match=f"heads.safetensors is damaged: .*{said}.*measure the profile again"):
        load_profiles(spoiled(tmp_path / "heads.safetensors", tensor))


def field(name, value):
    return lambda cards: cards["made"].update({name: value})


@pytest.mark.parametrize(
    "card",
    [
        *(field("layers", value) for value in (2, 0, -3, 3.0, "3", None, 2**60, True)),
        *(field("heads", value) for value in (4, [8])),
        *(field("model", value) for value in (None, 5, ["x"])),
        *(field("pictures", value) for value in (0, "many", None)),
        *(field("reliability", value) for value in ("high", 1e300, [])),
        *(field("stable", value) for value in (0, None)),
        *(field("versions", value) for value in (None, [], {"torch": 2})),
        *(field("parameters", value) for value in (None, [])),
        field("seed", -1),
        field("profiler", "other"),
        field("more", 1),
        lambda cards: cards["made"].pop("question"),
        lambda cards: cards.update({"made": None}),
        lambda cards: cards.update({"made": []}),
        lambda cards: cards.clear(),
    ],
)
def test_damaged_cards_are_refused(tmp_path, card):
    with pytest.raises(DataError, match=r"heads.safetensors is damaged"):
        load_profiles(spoiled(tmp_path / "heads.safetensors", card=card))


def test_a_profile_of_one_picture_has_no_errors_and_is_read(tmp_path):
    made(count=1).save(tmp_path / "heads.safetensors")
    assert bool(HeadProfile.load(tmp_path / "heads.safetensors").stderr.isnan().all())


def test_metadata_that_is_no_card_is_refused(tmp_path):
    for text in ("[" * 100_000, '{"format": NaN}', "\ud800", '{"format": "head-profiles", "version": 1}'):
        save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata={"vlmfix": text.encode(errors="replace").decode()})
        with pytest.raises(DataError, match="file is"):
            load_profiles(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file"):
        load_profiles(tmp_path / "pipe")


def test_profiles_go_over_profiles_alone(tmp_path):
    path, found = tmp_path / "heads.safetensors", made()
    for content in (b"precious", b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is there and holds no profiles"):
            found.save(path)
        assert path.read_bytes() == content
    save_file({"x": torch.zeros(1)}, path)  # weights
    before = path.read_bytes()
    with pytest.raises(DataError, match="is there and holds no profiles"):
        found.save(path)
    assert path.read_bytes() == before
    path.unlink()
    found.save(spoiled(path, changed("made/scores", lambda t: torch.full_like(t, NAN))))
    assert torch.equal(HeadProfile.load(path).scores, found.scores)
    mine = tmp_path / "mine"
    mine.write_text("precious")
    path.unlink()
    (tmp_path / ".heads.safetensors.new").symlink_to(mine)
    found.save(path)
    assert mine.read_text() == "precious"

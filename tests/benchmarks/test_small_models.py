"""The comparison of the small models, whole with tiny presets; and its page from made-up figures."""

import itertools
import json

import pytest
import torch

from longscan.benchmarks import recall, record, small_models, small_models_page
from longscan.benchmarks.recall import KINDS, NEAR, kinds_of, tokens_back
from longscan.benchmarks.small_models import FAMILIES, Task, curve, main
from longscan.benchmarks.small_models_page import nats_of, share_of
from longscan.data.batch import IGNORED_LABEL, Batch
from longscan.kernels import Segments
from longscan.launcher.run_folder import RunFolder
from longscan.models import preset_names

WORDS = ["def", "return", "class", "import", "self", "value", "index", "token", "state", "scan", "carry", "window"]
TINY = (
    "stages.0.seq_len=32",
    "stages.0.tokens=10Ki",
    "batch.tokens=512",
    "batch.micro_rows=8",
    "schedule.warmup_steps=2",
    "validation.rows=4",
    "run.device=cpu",
)


@pytest.fixture
def folders(tmp_path, results, monkeypatch):
    """Results and pages in a folder of the test's."""
    results()
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(small_models_page, "DOCS", tmp_path)
    return tmp_path


@pytest.fixture
def text(tmp_path):
    """A folder of sources, some longer than the longest rows scored."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        lines = (f"    {WORDS[i * number % 12]} = {WORDS[i % 11]}({i % (number + 1)})" for i in range(20 + 5 * number))
        (folder / f"module_{number}.py").write_text("\n".join(lines))
    (folder / "notes.txt").write_text("no source")
    return folder


def test_a_family_is_trained_scored_recorded_and_shown(folders, text):
    options = ["--work", str(folders / "work"), "--text", str(text), "--gpus", "2", "--size", "tiny"]
    main([*options, "--vocabulary", "300", "griffin", *TINY])
    figures = [json.loads(line) for line in (folders / "small_models-cpu.jsonl").read_text().splitlines()]
    name = " ".join(("griffin-tiny", *TINY))
    assert {figure["work"] for figure in figures} == {name}
    heldout = next(figure["value"] for figure in figures if figure["metric"] == small_models_page.HELDOUT)
    points = small_models_page.read_curves(small_models_page.curves_file())
    assert [(line["preset"], int(line["step"])) for line in points] == [(name, 10), (name, 20)]
    assert float(points[1]["bits_per_byte"]) < 0.8 * float(points[0]["bits_per_byte"])
    assert heldout < float(points[0]["bits_per_byte"])
    events = list(RunFolder.open(Task("griffin", "tiny", folders / "work", TINY).folder).events.read())
    loss = next(event["heldout_loss"] for event in reversed(events) if event["event"] == "validated")
    values = small_models_page.by_preset(figures)[name]
    shares, nats = ([values[name_of(kind)] for kind in KINDS] for name_of in (share_of, nats_of))
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert all(share > 0.01 for share in shares[:2])
    assert sum(s * n for s, n in zip(shares, nats, strict=True)) == pytest.approx(loss, rel=1e-5)
    page = (folders / "small-models.md").read_text()
    assert f"| {name} | 0.0M | {heldout:.4f} |  |" in page
    assert "rows of 8 | rows of 32 | rows of 64 | rows of 128 | rows of 256" in page
    assert "| hawk-small | 30.9M | not run |" in page


@pytest.fixture
def prepared(monkeypatch):
    """Takes the corpus for prepared."""
    monkeypatch.setattr(small_models, "prepare", lambda text, work, vocabulary: work.mkdir())


def test_what_fails_is_said(folders, prepared, monkeypatch):
    monkeypatch.setattr(small_models.sys, "executable", "/bin/false")
    options = ["--work", str(folders / "work"), "--text", "text", "--gpus", "2"]
    with pytest.raises(SystemExit, match=r"griffin-small x=y: exit status 1, see .*/griffin-small_x=y\.log"):
        main([*options, "griffin", "x=y"])


def test_what_does_not_end_in_time_is_ended_and_said(folders, prepared):
    options = ["--work", str(folders / "work"), "--text", "text", "--gpus", "1", "--size", "tiny"]
    with pytest.raises(SystemExit, match="hawk-tiny.*: ended after [12] s") as stopped:
        main([*options, "--deadline", "1.5", "hawk", "alibi", *TINY])
    assert "alibi-tiny" in str(stopped.value)
    assert "no time was left to begin it" in str(stopped.value)
    assert "small-models.md" in {file.name for file in folders.iterdir()}


def test_all_families_are_on_the_page():
    assert {f"{family}-small" for family in FAMILIES} == set(small_models_page.PRESETS)
    assert set(small_models_page.PRESETS) == {name for name in preset_names() if name.endswith("-small")}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_differ_in_the_model_alone(family, tmp_path, monkeypatch):
    monkeypatch.setattr(small_models, "check_run", lambda config: (config, None))
    first, config = (Task(name, "small", tmp_path, ("optimizer.lr=1e-3",)).config() for name in ("llama", family))
    assert config.optimizer.lr == 1e-3
    assert 50e6 <= config.stages[0].tokens <= 100e6
    config.model, config.run.folder = first.model, first.run.folder
    assert config == first


def test_the_page_of_what_was_measured(folders, results):
    def figures(work: str, heldout: float, **more) -> list[dict]:
        metrics = {
            small_models_page.PARAMETERS: 30.7e6,
            small_models_page.TOKENS: 60e6,
            small_models_page.HELDOUT: heldout,
            "bits per byte in rows of 512": heldout + 0.1,
            "bits per byte in rows of 2048": heldout,
            small_models_page.RATE: 4e5,
            small_models_page.MEMORY: 20.0,
            small_models_page.SECONDS: 170.0,
        }
        base = {"bench": "small_models", "impl": "longscan", "work": work, **more}
        return [{**base, "metric": metric, "value": value} for metric, value in metrics.items()]

    results(*figures("llama-small", 1.0, device="other"), *figures("llama-small", 0.8), *figures("hawk-small", 0.82))
    small_models_page.curves_file().write_text(
        "preset,step,tokens,loss,bits_per_byte\nhawk-small,10,655360,6.0,2.4\nhawk-small,20,1310720,4.0,1.6\n"
    )
    small_models_page.write()
    page = (folders / "small-models.md").read_text()
    assert "| llama-small | 30.7M | 0.8000 | +0.0% | 0.900 | 0.800 | 400,000 | 20.0 | 170 |" in page
    assert "| hawk-small | 30.7M | 0.8200 | +2.5% | 0.920 | 0.820 | 400,000 | 20.0 | 170 |" in page
    assert page.count("not run") == 6
    assert 5_000 < (folders / "figures" / "small_models.png").stat().st_size < 200_000


def test_the_gap_to_the_transformer_is_split_by_kind(folders, results):
    def figures(work: str, *nats: float) -> list[dict]:
        metrics = {small_models_page.HELDOUT: 1.0, small_models_page.PARAMETERS: 3e7, small_models_page.TOKENS: 6e7}
        metrics |= {small_models_page.RATE: 4e5, small_models_page.MEMORY: 2.0, small_models_page.SECONDS: 9.0}
        for kind, share, mean in zip(KINDS, (0.5, 0.3, 0.2), nats, strict=False):
            metrics |= {share_of(kind): share, nats_of(kind): mean}
        base = {"bench": "small_models", "impl": "longscan", "work": work}
        return [{**base, "metric": metric, "value": value} for metric, value in metrics.items()]

    families = {"llama": (3.0, 1.0, 2.0), "hawk": (3.1, 1.5, 3.5), "griffin": (2.8, 1.0, 1.0), "based": ()}
    results(*(figure for family, nats in families.items() for figure in figures(f"{family}-small", *nats)))
    page = small_models_page.page()
    assert "| share of all tokens | 50.0% | 30.0% | 20.0% |" in page
    assert "| llama-small | 3.000 | 1.000 | 2.000 |" in page
    assert "| hawk-small | 3.100 (10%) | 1.500 (30%) | 3.500 (60%) |" in page
    assert "| griffin-small | 2.800 (33%) | 1.000 (0%) | 1.000 (67%) |" in page
    assert page.count("based-small") == 1


@pytest.mark.parametrize("seed", range(4))
def test_how_far_back_a_pair_stands_is_what_a_loop_finds(seed):
    rows = [[40, 200, 60], [300], [1, 149, 150]]
    segments = Segments.from_lengths(rows, earlier=[5, 0, 0])
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randint(0, 2 + 4 * seed, (2, 3, 300), generator=generator)
    labels[0, -60:] = IGNORED_LABEL
    doc_start = segments.doc_start.view(3, 300)
    found = tokens_back(inputs, labels, doc_start)
    for row, index in itertools.product(range(3), range(300)):
        pairs = list(zip(inputs[row].tolist(), labels[row].tolist(), strict=True))
        earlier = range(max(0, int(doc_start[row, index])), index)
        back = next((index - place for place in reversed(earlier) if pairs[place] == pairs[index]), 0)
        assert found[row, index] == back
    assert (found > 0).any()


def test_kinds_of_token():
    assert kinds_of(torch.tensor([0, 1, NEAR, NEAR + 1, 2000])).tolist() == [0, 1, 1, 2, 2]


class Echo(torch.nn.Module):
    """A model whose loss is the label."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def hidden(self, inputs, segments):
        return inputs

    def cross_entropy(self, hidden, labels, **options):
        return labels.flatten().float()


def test_losses_are_summed_by_kind(monkeypatch):
    # 8 follows 1 again near and far; 7 does in another document only. Row 1 ends in padding.
    labels = torch.arange(200).repeat(2, 1) + 1000
    inputs = labels + 500
    for place, label in ((10, 7), (60, 8), (70, 8), (150, 8)):
        inputs[0, place], labels[0, place] = 1, label
    inputs[0, 160], labels[0, 160], labels[1, 100:] = 1, 7, IGNORED_LABEL

    class Rows:
        seq_len = 200

        def __len__(self):
            return 2

        def read(self, rows):
            of_rows = Segments.from_lengths([[[50, 150], [100, 100]][row] for row in rows])
            return Batch(inputs[rows], labels[rows], of_rows.cu_seqlens, of_rows.continues, of_rows.doc_start, (), 0.0)

    counted = labels[labels != IGNORED_LABEL].double()
    for at_once in (1, 400):
        monkeypatch.setattr(recall, "TOKENS_AT_ONCE", at_once)
        (new, mean), (near, near_mean), (far, far_mean) = recall.losses_by_kind(Echo(), Rows(), 768).values()
        assert (near, far) == pytest.approx((1 / 300, 1 / 300))
        assert new == pytest.approx(298 / 300)
        assert (near_mean, far_mean) == (8, 8)
        assert mean == pytest.approx((counted.sum().item() - 16) / 298)
    assert recall.losses_by_kind(Echo(), Rows(), 1)["new"][0] == 198 / 200


def test_points_of_a_curve_are_means(tmp_path, monkeypatch):
    class Folder:
        class metrics:  # noqa: N801
            @staticmethod
            def standing():
                return [{"step": n, "tokens": 100, "loss": float(n), "bits_per_byte": 2.0 * n} for n in range(1, 13)]

    monkeypatch.setattr(small_models.RunFolder, "open", lambda path: Folder)
    assert list(curve(tmp_path)) == [(10, 1000, 5.5, 11.0), (12, 1200, 11.5, 23.0)]


@pytest.mark.parametrize(
    "arguments, message", [(["hawks", "--here"], "hawks: no family; known: linearized"), (["hawk"], "--text")]
)
def test_bad_arguments_are_said(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err

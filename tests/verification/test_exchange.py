"""Files for other verifiers say what ours was asked; their answers are read as they are."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rampart.attacks import Ball, pgd
from rampart.data import Split, to_pixels
from rampart.errors import Contradiction, ModelError, RampartError
from rampart.models import Classifier, predict, weights_digest
from rampart.verification import VerificationPlan, choose, verify_split
from rampart.verification.answers import read_results
from rampart.verification.exchange import export, question
from rampart.verification.verdict import is_counterexample
from tests.nets import points_in_ball, undecided_classifier

EPS, COUNT = 0.1, 6


@pytest.fixture(scope="module")
def model() -> Classifier:
    return undecided_classifier()


@pytest.fixture(scope="module")
def split(model: Classifier) -> Split:
    """12 images, three of four labelled as the model says."""
    torch.manual_seed(4)
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    labels = predict(model, to_pixels(images))
    labels[::4] = (labels[::4] + 1) % 3
    return Split(images, labels)


@pytest.fixture(scope="module")
def folder(model: Classifier, split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exchange")
    export(model, split, choose(model, split, COUNT, "common"), EPS, 7.5, place)
    return place


class Property:
    """A VNN-LIB file of boxes and one disjunction of comparisons of outputs, read by a parser of its own."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        assert len(re.findall(r"\(declare-const X_\d+ Real\)", text)) == 192
        assert len(re.findall(r"\(declare-const Y_\d+ Real\)", text)) == 3
        ends: dict[str, dict[int, float]] = {">=": {}, "<=": {}}
        for relation, place, value in re.findall(r"\(assert \((>=|<=) X_(\d+) (-?\d+\.\d+)\)\)", text):
            ends[relation][int(place)] = float(value)
        self.lower = torch.tensor([ends[">="][i] for i in range(192)], dtype=torch.float64)
        self.upper = torch.tensor([ends["<="][i] for i in range(192)], dtype=torch.float64)
        (alternatives,) = re.findall(r"\(assert \(or (.*)\)\)\n", text)
        self.pairs = [(int(a), int(b)) for a, b in re.findall(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)", alternatives)]

    def holds(self, x: Tensor, logits: Tensor) -> bool:
        """Whether the point is what the file asks for: a counterexample."""
        flat = x.flatten().double()
        inside = bool((flat >= self.lower).all() and (flat <= self.upper).all())
        return inside and any(bool(logits[a] >= logits[b]) for a, b in self.pairs)


def test_the_graph_gives_the_models_logits_on_pixels(model: Classifier, folder: Path) -> None:
    (graph,) = (folder / "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for count in (1, 5):
        x = torch.rand(count, 3, 8, 8)
        (theirs,) = session.run(None, {given.name: x.numpy()})
        ours = model(x).detach().numpy()
        assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max()


def test_a_property_is_met_by_counterexamples_alone(model: Classifier, split: Split, folder: Path) -> None:
    seen = set()
    for line in csv.reader((folder / "instances.csv").open()):
        index = int(re.findall(r"image_(\d+)_", line[1])[0])
        asked, label = Property(folder / line[1]), int(split.labels[index])
        image = to_pixels(split.images[index])
        attacked = pgd(model, image[None], split.labels[index : index + 1], EPS, restarts=3).adversarial[0]
        # The ends of what is asked are rounded to float32.
        near = [*Ball.around(image[None], EPS).clip(points_in_ball(image, EPS, 30)), *attacked]
        outside = image + 3 * EPS
        for point in [*near, outside, outside.clamp(0, 1)]:
            with torch.no_grad():
                wanted = asked.holds(point, model(point[None])[0])
            seen.add(wanted)
            # A tie counts as a counterexample for the file; none occurs among random points.
            assert wanted == is_counterexample(model, point, image, label, EPS)
    assert seen == {True, False}


def test_there_is_a_question_for_each_image_that_is_classified_correctly(
    model: Classifier, split: Split, folder: Path
) -> None:
    lines = list(csv.reader((folder / "instances.csv").open()))
    chosen = choose(model, split, COUNT, "common")
    correct = [i for i in chosen if int(predict(model, to_pixels(split.images[i])[None])) == int(split.labels[i])]
    assert 0 < len(correct) < COUNT
    assert [line[1] for line in lines] == [f"vnnlib/{question(split, i, 3, EPS)}.vnnlib" for i in correct]
    assert lines[0][1].startswith(f"vnnlib/image_{correct[0]}_eps_0.1_")
    assert {(line[0], line[2]) for line in lines} == {(f"onnx/{weights_digest(model)}.onnx", "7.5")}


def test_answers_of_another_verifier_become_a_ledger(
    model: Classifier, split: Split, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images without a line are unknown; the others keep their answer, seconds and the tool's name."""
    answers = ["unsat", "timeout", "no_result_in_file"]
    instances = list(csv.reader((folder / "instances.csv").open()))
    file = tmp_path / "results.csv"
    with file.open("w", newline="") as out:
        for (onnx, place, _), answer in zip(instances, answers, strict=False):
            csv.writer(out).writerow(["some-tool", f"./{onnx}", f"./{place}.gz", 0.5, answer, 1.25])
    # The points that the tool has proved are robust for us, too: a radius of next to nothing.
    results = read_results(file, model, split, choose(model, split, COUNT, "common"), EPS)
    assert sorted(found.status for found in results.values()) == ["safe", "timeout"] + ["unknown"] * (COUNT - 2)
    told = [found for found in results.values() if found.stage != "none"]
    assert [(found.stage, found.seconds) for found in told] == [("some-tool", 1.25)] * 3
    assert "taken as unknown: ['no_result_in_file']" in caplog.text
    ledger, examples = verify_split(
        model, split, VerificationPlan(eps=EPS, images=COUNT, engine=str(_without_proofs(file)))
    )
    assert not examples
    assert ledger["verdict"].isna().equals(~ledger["correct"])
    assert set(ledger["verdict"].dropna()) <= {"timeout", "unknown"}


def test_what_another_verifier_calls_unsafe_counts_with_a_counterexample_that_the_model_confirms(
    model: Classifier, split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest, file = weights_digest(model), tmp_path / "results.csv"
    broken = pgd(model, to_pixels(split.images), split.labels, EPS, restarts=3)
    correct = predict(model, to_pixels(split.images)) == split.labels
    chosen = (correct & broken.success[0]).nonzero().flatten().tolist()
    assert len(chosen) >= 5
    good, packed, missing, harmless, short = chosen[:5]
    points = {index: broken.adversarial[0][index].flatten().tolist() for index in (good, packed)}
    points |= {harmless: to_pixels(split.images[harmless]).flatten().tolist(), short: [0.5] * 7}
    questions = {index: question(split, index, 3, EPS) for index in chosen}
    names = {index: f"{digest}_{questions[index]}.counterexample" for index in chosen}
    for index, values in points.items():
        lines = "\n".join(f"(X_{i} {value!r})" for i, value in enumerate(values))
        text = f"sat\n({lines}\n(Y_0 -1.5))\n".encode()
        if index == packed:
            (tmp_path / f"{names[index]}.gz").write_bytes(gzip.compress(text))
        else:
            (tmp_path / names[index]).write_bytes(text)
    file.write_text(
        "".join(f"tool,onnx/{digest}.onnx,vnnlib/{questions[index]}.vnnlib,0,sat,1\n" for index in chosen[:5])
    )
    results = read_results(file, model, split, chosen[:5], EPS)
    assert [results[i].status for i in (good, packed)] == ["unsafe"] * 2
    for index in (good, packed):
        example = results[index].counterexample
        assert example is not None
        assert is_counterexample(model, example, to_pixels(split.images[index]), int(split.labels[index]), EPS)
    assert [results[i].status for i in (missing, harmless, short)] == ["unknown"] * 3
    assert (
        f"image {missing} is called unsafe, but taken as unknown: {tmp_path}/{names[missing]} cannot be" in caplog.text
    )
    assert f"the model does not confirm {tmp_path}/{names[harmless]}" in caplog.text
    assert "it gives 7 values, not one of each of the inputs X_0 to X_191" in caplog.text
    # The ledger keeps the points.
    ledger, examples = verify_split(model, split, VerificationPlan(eps=EPS, images=len(split.labels), engine=str(file)))
    assert set(examples) == {good, packed} == set(ledger.loc[ledger["verdict"] == "unsafe", "image"])


def _without_proofs(file: Path) -> Path:
    """The same answers but for proofs, which PGD would attack."""
    other = file.with_name("others.csv")
    other.write_text("".join(line for line in file.read_text().splitlines(True) if "unsat" not in line))
    return other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tool,onnx/MODEL.onnx,vnnlib/image_1_eps_0.1.vnnlib,0,unsat,1\n", "give model, dataset, images, selection"),
        ("tool,onnx/other.onnx,vnnlib/QUESTION.vnnlib,0,unsat,1\n", "give model, dataset, images, selection"),
        ("tool,onnx/MODEL.onnx\n", "cannot be read as a results.csv"),
        ("tool,onnx/MODEL.onnx,vnnlib/QUESTION.vnnlib,0,unsat,-1\n", "cannot be read as a results.csv (no time"),
        ("tool,onnx/MODEL.onnx,vnnlib/QUESTION.vnnlib,0,unsat,soon\n", "cannot be read as a results.csv"),
        (f"tool,{'x' * 200_000}\n", "cannot be read as a results.csv"),
        (None, "cannot be read as a results.csv"),
    ],
)
def test_results_that_cannot_be_used_are_refused(
    text: str | None, says: str, model: Classifier, split: Split, tmp_path: Path
) -> None:
    file = tmp_path / "results.csv"
    if text is not None:
        file.write_text(text.replace("MODEL", weights_digest(model)).replace("QUESTION", question(split, 1, 3, EPS)))
    with pytest.raises(RampartError, match=re.escape(says)):
        read_results(file, model, split, [1, 2], EPS)


def test_blank_lines_are_passed_over_and_two_answers_are_one_too_many(
    model: Classifier, split: Split, tmp_path: Path
) -> None:
    file = tmp_path / "results.csv"
    line = f"tool,onnx/{weights_digest(model)}.onnx,vnnlib/{question(split, 1, 3, EPS)}.vnnlib,0,ANSWER,1\n"
    file.write_text("\n" + line.replace("ANSWER", "unsat") + "\n" + line.replace("ANSWER", "holds"))
    assert read_results(file, model, split, [1], EPS)[1].status == "safe"
    file.write_text(line.replace("ANSWER", "unsat") + line.replace("ANSWER", "sat"))
    with pytest.raises(Contradiction, match="image 1 both safe and unsafe"):
        read_results(file, model, split, [1], EPS)


def test_questions_of_several_models_share_a_folder(split: Split, tmp_path: Path) -> None:
    models = [undecided_classifier(), undecided_classifier()]
    with torch.no_grad():
        models[1].head.bias += 1e-3
    for model in models:
        for _ in range(2):  # once more is as good as once
            export(model, split, choose(model, split, COUNT, "common"), EPS, 7.5, tmp_path)
    asked = [tuple(line[:2]) for line in csv.reader((tmp_path / "instances.csv").open())]
    assert len(set(asked)) == len(asked)
    assert {graph for graph, _ in asked} == {f"onnx/{weights_digest(model)}.onnx" for model in models}


@pytest.mark.parametrize("changed", ["image", "label"])
def test_a_question_about_another_dataset_is_another_question(split: Split, tmp_path: Path, changed: str) -> None:
    """Which is there beside the first, and whose answer answers it alone."""
    model = undecided_classifier()
    images, labels = split.images.clone(), predict(model, to_pixels(split.images))
    first = Split(split.images, labels)
    export(model, first, [*range(12)], EPS, 7.5, tmp_path)
    (place,) = (tmp_path / "vnnlib").glob("image_1_*")
    text = place.read_text()
    if changed == "image":
        images[1, 0, 0, 0] ^= 1
    else:
        with torch.no_grad():
            model.head.bias[(labels[1] + 1) % 3] += 1000
    other = Split(images, predict(model, to_pixels(images)))
    export(model, other, [*range(12)], EPS, 7.5, tmp_path)
    assert place.read_text() == text
    assert len(list((tmp_path / "vnnlib").glob("image_1_*"))) == 2
    answers = tmp_path / "results.csv"
    answers.write_text(f"tool,onnx/{weights_digest(model)}.onnx,{place},0,unsat,1\n")
    with pytest.raises(RampartError, match="has no answer for this model"):
        read_results(answers, model, other, [1], EPS)


def test_questions_that_a_folder_holds_are_not_written_again(model: Classifier, split: Split, tmp_path: Path) -> None:
    chosen = choose(model, split, COUNT, "common")
    export(model, split, chosen, EPS, 7.5, tmp_path)
    files = sorted((tmp_path / "vnnlib").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    export(model, split, chosen, EPS, 7.5, tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert sorted((tmp_path / "vnnlib").iterdir()) == files


def test_nobody_reads_a_graph_that_is_not_checked_or_a_question_that_is_half_written(
    model: Classifier, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose(model, split, COUNT, "common")
    graph = tmp_path / "onnx" / f"{weights_digest(model)}.onnx"
    check, write = onnxruntime.InferenceSession, Path.write_text

    def checked(place: str, **settings: object) -> onnxruntime.InferenceSession:
        assert not graph.exists()
        return check(place, **settings)

    def interrupted(place: Path, text: str, **settings: object) -> None:
        write(place, text[:100], **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "InferenceSession", checked)
        patched.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(model, split, chosen, EPS, 7.5, tmp_path)
    assert graph.exists()
    assert not list((tmp_path / "vnnlib").iterdir())
    monkeypatch.setattr("rampart.verification.exchange.TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="differs from the model"):
        export(model, split, chosen, EPS, 7.5, tmp_path)
    assert list((tmp_path / "onnx").iterdir()) == [graph]


def test_a_folder_that_cannot_be_written_is_named(split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RampartError, match=f"exported to {tmp_path}/file"):
        export(undecided_classifier(), split, [1, 2], EPS, 1.0, tmp_path / "file")


def test_a_model_that_cannot_be_exported_is_refused(split: Split, tmp_path: Path) -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = x.flatten(1)[:, :3]
            return values if float(x.sum()) > 1 else -values

    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        export(Fickle().eval(), split, [1, 2], EPS, 1.0, tmp_path)

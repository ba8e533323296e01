"""Branch and bound against an exact solver, and its parts against what they say of themselves."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rampart.bounds import alpha, crown, reduced
from rampart.bounds.box import pixel_box
from rampart.bounds.domains import Domains, Parts, back, forth, optimise
from rampart.bounds.margins import PROVED, margin_spec
from rampart.bounds.narrowing import Narrowed, narrowed
from rampart.bounds.reduced import Reduced, Rows
from rampart.models import Layout
from rampart.verification import branching, splitting, verify
from rampart.verification.branching import branch_and_bound
from rampart.verification.program import linear_program
from rampart.verification.verdict import is_counterexample
from tests.exact import exact_margins, smallest_margin, tiny_net
from tests.nets import NETS, small_net
from tests.problems import outputs, problem, values
from tests.verification.test_cascade import predicted, refutes


def random_net(seed: int) -> tuple[nn.Sequential, torch.Tensor]:
    """A dense or convolutional network of up to 30 ReLUs, and an image for it."""
    torch.manual_seed(seed)
    dense = seed % 2
    if dense:
        hidden = [int(n) for n in torch.randint(3, 11, (int(torch.randint(1, 4, ())),))]
        model, image = tiny_net(tuple(hidden), inputs=4), torch.rand(1, 1, 4)
    else:
        channels, stride = int(torch.randint(1, 3, ())), int(torch.randint(1, 3, ()))
        conv = nn.Conv2d(1, channels, 3, stride=stride, padding=1)
        image = torch.rand(1, 3, 3)
        size = conv(image).numel()
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(size, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    return model, image


@pytest.mark.parametrize("part", range(10))
def test_verdicts_of_300_networks_are_those_of_an_exact_solver(part: int) -> None:
    seen = set()
    for seed in range(part * 30, part * 30 + 30):
        model, image = random_net(seed)
        label = predicted(model, image)
        eps = float(0.02 + 0.3 * torch.rand(()))
        exact = smallest_margin(model, image, label, eps)
        found = verify(model, image, label, eps)
        if abs(exact) < 2 * PROVED:  # nearer to 0 than a proof in float32 can tell
            continue
        assert found.status in ({"safe", "safe-incomplete"} if exact > 0 else {"unsafe"}), (seed, exact, found)
        assert found.lower_bound <= exact + 1e-6
        if found.status == "unsafe":
            assert refutes(model, found, image, label, eps)
        seen.add(found.status)
    assert "unsafe" in seen
    assert len(seen) >= 2


@pytest.mark.parametrize("joint", [False, True])
def test_verdicts_are_exact_where_every_part_is_narrowed(
    joint: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(splitting.Search, "settle", lambda _, opened, *rest: opened)
    if joint:  # and the neurons of each layer are bounded one by one first, then together in every part
        request.getfixturevalue("everywhere")
        monkeypatch.setattr(branching, "JOINT_SHARE", float("inf"))
    narrowings = 0

    def counted(*args: object) -> Narrowed:
        nonlocal narrowings
        narrowings += 1
        return narrowed(*args)

    monkeypatch.setattr(branching, "narrowed", counted)
    seen = Counter[str]()
    for seed in range(300, 500):
        model, image = random_net(seed)
        label = predicted(model, image)
        eps = float(0.1 + 0.2 * torch.rand(()))
        exact = smallest_margin(model, image, label, eps)
        if abs(exact) < 2 * PROVED:
            continue
        before = narrowings
        found = verify(model, image, label, eps)
        assert found.status in ({"safe", "safe-incomplete"} if exact > 0 else {"unsafe"}), (seed, exact, found)
        assert found.lower_bound <= exact + 1e-6
        seen[found.status] += narrowings > before
    assert seen["safe"] > 5
    assert seen["unsafe"] > 0


@pytest.mark.parametrize("rule", ["babsr", "gap"])
def test_every_rule_comes_to_the_same_verdicts(rule: str) -> None:
    for seed in range(20):
        model, image = random_net(seed)
        label = predicted(model, image)
        one, other = (verify(model, image, label, 0.2, branching=r) for r in ("kfsb", rule))
        assert {one.status, other.status} in ({one.status}, {"safe", "safe-incomplete"})


def test_the_exact_solvers_agree() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, image = tiny_net((3, 3)), torch.rand(1, 1, 2)
        exact = float(exact_margins(model, image, 0, 0.2).min())
        assert smallest_margin(model, image, 0, 0.2) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_the_reduced_problem_has_the_bounds_of_the_whole_network(name: str) -> None:
    net, bounds, _, _ = problem(name, 0.05)
    found = back(net, Domains.roots(net, net.outputs))
    assert torch.allclose(found.bound, bounds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_the_reduced_problem_is_the_network_in_the_ball(name: str) -> None:
    """With the true signs of the neurons at a point its linear forms give the network's outputs there."""
    net, _, model, image = problem(name, 0.05)
    for _ in range(20):
        x = (net.center + (2 * torch.rand(len(net.center)) - 1) * net.half).view(image.shape)
        (v,) = values(net, x.flatten()[None])
        assert bool((v >= net.lower - 1e-4).all())
        assert bool((v <= net.upper + 1e-4).all())
        (out,) = outputs(net, x.flatten()[None])
        with torch.no_grad():
            assert torch.allclose(out, model(x[None])[0], rtol=1e-4, atol=1e-4)


def split(net: Reduced, count: int = 12) -> Domains:
    """Outputs over random parts of the ball, with random slopes and multipliers, in float64."""
    torch.manual_seed(0)
    net.neurons, net.outputs = net.neurons.double(), net.outputs.double()
    for name in ("lower", "upper", "center", "half"):
        setattr(net, name, getattr(net, name).double())
    shape = (count, len(net.lower))
    rows = net.outputs.at(torch.arange(count) % len(net.outputs.constant))
    parts = replace(Parts.whole(net, count), signs=torch.randint(-1, 2, shape).double())
    return Domains(rows, parts, torch.rand(shape).double(), torch.rand(shape).double())


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_the_way_forth_gives_the_derivatives(name: str) -> None:
    net, _, _, _ = problem(name, 0.05)
    domains = split(net)
    found = back(net, domains)
    v = forth(net, domains, found)
    for value, derivative in (
        (domains.slopes, found.relu.clamp(min=0) * v * (domains.parts.signs == 0)),
        (domains.multipliers, -domains.parts.signs * v),
    ):
        direction, before = torch.randn_like(value), value.clone()
        ends = [
            back(net, replace(domains, **{name_of(domains, value): before + h * direction})).bound
            for h in (1e-7, -1e-7)
        ]
        assert torch.allclose((ends[0] - ends[1]) / 2e-7, (derivative * direction).sum(1), atol=1e-5)


def name_of(domains: Domains, value: torch.Tensor) -> str:
    return "slopes" if value is domains.slopes else "multipliers"


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_a_domains_bound_holds_at_every_point_of_the_domain(name: str) -> None:
    net, _, _, _ = problem(name, 0.05)
    domains = split(net, 60)
    # Few splits, so that points of each part are found by sampling.
    domains.parts.signs[:, torch.randperm(len(net.lower))[2:]] = 0
    bound = optimise(net, domains, 5).bound
    checked = 0
    for _ in range(2000):
        x = net.center + (2 * torch.rand(len(net.center)).double() - 1) * net.half
        (v,) = values(net, x[None])
        inside = (domains.parts.signs * v >= 0).all(1)
        value = domains.rows.of_input @ x + domains.rows.of_relu @ v.relu() + domains.rows.constant
        assert bool((value >= bound - 1e-9)[inside].all())
        checked += int(inside.sum())
    assert checked > 100


def test_more_steps_give_no_looser_bounds_and_rows_above_the_target_stop() -> None:
    net, _, _, _ = problem("strided", 0.1)
    roots = Domains.roots(net, net.outputs)
    few, many = (optimise(net, roots, steps).bound for steps in (2, 30))
    assert bool((many >= few).all())
    assert bool((many > few).any())
    at_once = optimise(net, roots, 30, target=-1e9).bound
    assert torch.equal(at_once, back(net, roots).bound)


def test_a_linear_program_finds_the_minimum_where_all_signs_are_known() -> None:
    torch.manual_seed(0)
    model, image = tiny_net((4,)), torch.rand(1, 1, 2)
    x = image[None]
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, 0.4)
        inputs = crown.preactivations(chain, box)
        spec = margin_spec(torch.tensor([0]), 3)
        net = reduced.reduce(chain, inputs, box, spec[:, 1:].float())
    count = len(net.lower)
    assert count > 1
    best = torch.full((2,), torch.inf)
    for number in range(2**count):
        signs = torch.tensor([1.0 if number >> k & 1 else -1.0 for k in range(count)])
        for row in range(2):
            bound, _ = linear_program(net, net.outputs.at(slice(row, row + 1)), signs)
            best[row] = min(best[row], bound)
    assert best.tolist() == pytest.approx(exact_margins(model, image, 0, 0.4)[1:].tolist(), abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-15, 1e8])
def test_a_linear_program_does_not_depend_on_the_scale_of_the_logits(scale: float) -> None:
    row = Rows(scale * torch.tensor([[1.0, -2, 0.5]]), torch.zeros(1, 0), scale * torch.tensor([0.1]))
    nothing = Rows(torch.zeros(0, 3), torch.zeros(0, 0), torch.zeros(0))
    net = Reduced([], nothing, row, torch.zeros(0), torch.zeros(0), torch.full((3,), 0.5), torch.full((3,), 0.1))
    assert linear_program(net, row, torch.zeros(0))[0] / scale == pytest.approx(-0.5)


def search(seed: int, eps: float = 0.3, **limits: object) -> tuple[object, float]:
    """(outcome of an open problem, CROWN's lowest bound of it)."""
    torch.manual_seed(seed)
    model, image = tiny_net((12, 12), inputs=6), torch.rand(1, 1, 6)
    x, label = image[None], predicted(model, image)
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, eps)
        inputs = crown.preactivations(chain, box)
        spec = margin_spec(torch.tensor([label]), 3)[:, [j for j in range(3) if j != label]].float()
        net = reduced.reduce(chain, inputs, box, spec)
        roots = optimise(net, Domains.roots(net, net.outputs), 20)
        given = {"deadline": time.perf_counter() + 60, "target": PROVED, **limits}
        return branch_and_bound(net, roots, lambda points: None, **given), float(roots.bound.min())


@pytest.mark.parametrize("rule", ["babsr", "gap", "kfsb"])
def test_no_domain_is_put_back_as_a_child_of_itself(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, splits = splitting.Search.split, []

    def split(self: splitting.Search, parents: list[splitting.Domain], *given: object) -> tuple[Tensor, Tensor]:
        signs, parent = whole(self, parents, *given)
        before = torch.stack([domain.signs for domain in parents]).float()[parent]
        splits.append(((signs != 0).sum(1) > (before != 0).sum(1)).all())
        return signs, parent

    monkeypatch.setattr(splitting.Search, "split", split)
    for seed in range(12):
        search(seed, rule=rule, max_domains=400)
    assert len(splits) > 20
    assert all(splits)


def test_at_a_limit_the_best_proven_bound_is_reported() -> None:
    for limit in ({"max_domains": 40}, {"deadline": 0.0}):
        outcome, root = search(3, batch=8, **limit)
        assert outcome.status == "timeout"
        assert root <= outcome.bound <= PROVED
    assert outcome.domains == 0


def test_a_longer_search_has_a_better_bound() -> None:
    bounds = [search(3, batch=8, max_domains=count)[0].bound for count in (8, 64, 256)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]


def test_alpha_crown_keeps_the_bounds_of_crown_where_the_problem_is_too_large(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reduced, "LIMIT", 10)
    model, x, y = small_net("strided")
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, 0.05)
        inputs = crown.preactivations(chain, box)
        spec = margin_spec(y, chain.output.shape[1]).float()
        plain = crown.backward(chain, inputs, box, spec)
        assert torch.allclose(alpha.optimise(chain, inputs, box, spec), plain, atol=1e-5)
    assert "too many unstable neurons" in caplog.text
    label = predicted(model, x[0])
    found = verify(model, x[0], label, 0.1)
    assert found.domains == 0
    assert found.status in {"unknown", "safe-incomplete"} or refutes(model, found, x[0], label, 0.1)


def test_rows_are_cut_and_joined() -> None:
    rows = Rows(torch.rand(3, 4), torch.rand(3, 2), torch.rand(3))
    again = Rows.joined([rows.at(slice(0, 1)), rows.at(slice(1, 3))])
    assert all(torch.equal(one, other) for one, other in zip(rows, again, strict=True))


def test_a_gpu_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = search(10, eps=0.1, batch=64)
    sizes: list[int] = []

    def small(net: Reduced, domains: Domains, *rest: object, **named: object) -> object:
        sizes.append(len(domains))
        if len(domains) > 8:
            raise torch.OutOfMemoryError
        return optimise(net, domains, *rest, **named)

    monkeypatch.setattr(splitting, "optimise", small)
    halved, _ = search(10, eps=0.1, batch=64)
    assert max(sizes) > 8
    assert "going on with 8 domains" in caplog.text
    assert halved.status == whole.status == "safe"


def test_too_many_open_domains_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "OPEN_BYTES", 100)
    outcome, root = search(3, batch=8)
    assert outcome.status == "timeout"
    assert root <= outcome.bound <= PROVED


@pytest.mark.parametrize("faint", [9e-10, 2e-9])
def test_what_the_solver_takes_for_nothing_is_not_proved(faint: float) -> None:
    """HiGHS drops coefficients below 1e-9 of a row's largest; 3,000 of them let a neuron pass that it calls off."""
    count = 3000
    apart, passing, last = nn.Linear(count + 2, 3), nn.Linear(3, 1), nn.Linear(1, 2)
    with torch.no_grad():
        for layer in (apart, passing, last):
            layer.weight.zero_()
            layer.bias.zero_()
        apart.weight[:2, 1] = torch.tensor([1.0, -1.0])
        apart.bias[:2] = torch.tensor([-0.5137, 0.5137])
        apart.weight[2, 0], apart.weight[2, 2:] = 1.0, faint
        passing.weight.copy_(torch.tensor([[-1.0, -1.0, 1.0]]))
        passing.bias.fill_(-0.5500005)
        last.weight[0, 0], last.bias[0] = -900 / (faint * 1e6), 1.0
    model = nn.Sequential(nn.Flatten(), apart, nn.ReLU(), passing, nn.ReLU(), last).eval()
    image = torch.ones(1, 1, count + 2)
    image[0, 0, :2] = 0.5
    wrong = image.clone()
    wrong[0, 0, :2] = torch.tensor([0.5499999, 0.5137])
    assert is_counterexample(model, wrong, image, 0, 0.05)
    assert verify(model, image, 0, 0.05, timeout=20, attack_first=True).status != "safe"

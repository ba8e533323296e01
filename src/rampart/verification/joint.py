"""The errors of a place's relaxations taken together, where a linear bound takes each neuron's by itself.

A linear bound replaces Σ_j r_j ReLU(v_j) by Σ_j p_j v_j, and is charged, neuron by neuron, with the least value that
r_j ReLU(v_j) - p_j v_j can have. But at no point of the ball are all neurons at a place of a map as bad as that: the
least value of their sum is larger. It is bounded by branch and bound of the place's own problem (`neurons.Site`).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rampart.bounds.domains import Domains
from rampart.bounds.reduced import Reduced, Rows
from rampart.verification.neurons import Site, branched_bounds

# What no charge on a network's own scale, however small, falls below.
TINY = 1e-30


def charge(relu: Tensor, domains: Domains, sites: list[Site]) -> Tensor:
    """[D, S] what the rows' linear bounds are charged with for the neurons of each site, 0 or less.

    Args:
        relu: [D, U] coefficients of ReLU(v) on the way back (`Sweep.relu`).
    """
    _, intercept = domains.parts.above
    charged = relu.clamp(max=0) * intercept
    return torch.stack([charged[:, site.which].sum(1) for site in sites], 1)


def joint_gain(net: Reduced, domains: Domains, relu: Tensor, sites: list[Site], enough: Tensor, until: float) -> Tensor:
    """[D] by how much the rows' bounds rise, where the neurons of each site are bounded together.

    Args:
        relu: [D, U] coefficients of ReLU(v) on the way back (`Sweep.relu`).
        enough: [D], beyond which a gain is of no use.
        until: as time.perf_counter() tells it, after which sites keep what they are charged with.
    """
    above, _ = domains.parts.above
    # What is known of a neuron's sign holds in the part alone, and its error is 0 or more there.
    relu = relu.masked_fill(~domains.parts.free, 0)
    taken = relu * torch.where(relu < 0, above, domains.below)
    charged = charge(relu, domains, sites)
    gain = torch.zeros_like(enough)
    for number in charged.sum(0).argsort().tolist():
        left = (gain <= enough).nonzero().squeeze(1)
        if not len(left) or time.perf_counter() > until:
            break
        which, alone = sites[number].which, -charged[left, number]
        of_relu = torch.zeros_like(relu[left]).index_copy(1, which, relu[left][:, which])
        replaced, linear = net.neurons.at(which), taken[left][:, which]
        errors = Rows(-linear @ replaced.of_input, of_relu - linear @ replaced.of_relu, -linear @ replaced.constant)
        # On a scale that suits the steps of `optimise`, whatever that of the logits.
        scale = alone.clamp(min=TINY)
        problem = sites[number].problem(net, errors.times(1 / scale), with_own=True)
        gain[left] += (branched_bounds(problem, until) * scale + alone).clamp(min=0)
    return gain

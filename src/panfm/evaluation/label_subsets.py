"""Few labels: which groups of a training part have theirs, at a fraction and in a draw.

    classes, groups of the training part + fraction + draw -> places of the labelled units

A pure function of (task, split, draw): everybody who measures 10 % of a task measures the same 10 %. Needs no torch.
"""

import numpy as np
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.evaluation.splits import hash_number


def compute_label_subset(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, fraction: float, draw: int, task: str, split_hash: str
) -> NDArray[np.int64]:
    """Choose the images whose labels may be used: `fraction` of the GROUPS. Returns places, int64 [n], sorted.

    Each draw is one fixed order of all groups, and a fraction is a prefix of it: subsets of one draw are nested. The
    order is stratified: a group counts for its rarest class (by groups in training), each class's groups are shuffled
    by a hash of (task, split, draw, group) and spread evenly over the order; one group of every class comes first, so
    that even 1 % has each class wherever a class is the rarest of some group.

    labels: int64 [N]; groups: [N]. draw: number of the draw, from 0. fraction in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"label fraction {fraction:g}: it must be above 0 and at most 1, for example 0.1")
    if fraction == 1:
        return np.arange(len(labels), dtype=np.int64)
    names, group_of = np.unique(groups, return_inverse=True)
    class_of = _compute_group_classes(labels, group_of, len(names))
    ticket = np.array([hash_number("labels", task, split_hash, str(draw), str(name)) for name in names])

    place = np.empty(len(names))  # in (0, 1): where in its class's shuffled order a group stands; -1 = first of all
    for number in np.unique(class_of):
        members = np.flatnonzero(class_of == number)
        shuffled = members[np.argsort(ticket[members], kind="stable")]
        place[shuffled] = (np.arange(len(members)) + 0.5) / len(members)
        place[shuffled[0]] = -1
    order = np.lexsort((ticket, place))
    num_groups = max(round(fraction * len(names)), len(np.unique(class_of)))
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order[:num_groups]] = True
    return np.flatnonzero(chosen[group_of]).astype(np.int64)


def _compute_group_classes(labels: NDArray[np.int64], group_of: NDArray[np.intp], num_groups: int) -> NDArray[np.int64]:
    """The class that each group counts for: of those it has, the one that fewest groups have (ties: the later one)."""
    num_classes = int(labels.max()) + 1
    has = np.zeros((num_groups, num_classes), dtype=bool)
    has[group_of, labels] = True
    rarity = np.lexsort((-np.arange(num_classes), has.sum(axis=0)))  # classes, rarest first
    first = has[:, rarity].argmax(axis=1)
    return np.asarray(rarity[first], dtype=np.int64)

"""Answers in three sentences who is worst off, by how much, and whether that is more than chance."""

import numpy as np

from config.readers import listed
from eval.fairness import summary
from eval.results import Results
from eval.uncertainty import by_chance, is_within_chance

SAME = 1e-9  # percentage points within which two accuracies are equal


def answer(results: Results) -> tuple[str, ...]:
    """Returns the three sentences, from the model with the best average and from how many models it is so.

    For sets that are not groups, and for a single group, the sentences say how accurate the model is, and that nothing
    follows for fairness.
    """
    best = int(results.accuracies[:, results.whole].mean(1).argmax())
    if not results.has_spread:
        return _without_groups(results, best)
    return _who(results, best), _by_how_much(results, best), _chance(results, best)


def _without_groups(results: Results, best: int) -> tuple[str, ...]:
    values, names = _values(results)[best], _names(results)
    title = results.models[best].title
    who = f"{title}, the model of the best average," if len(results.models) > 1 else title
    sentences = [f"{who} decides {values.mean():.2f} % of the pairs correctly."]
    if results.of_groups:
        one_group = f"Only {names[0]} holds genuine and impostor pairs in every fold"
        return (*sentences, f"{one_group}: its accuracy does not tell whether the model is fair.")
    if len(names) == 1:
        return (
            *sentences,
            "There is one set of pairs and nothing to compare it with: it does not tell who is worse off.",
        )
    lowest = int(values.argmin())
    sentences.append(f"Its lowest accuracy is {values[lowest]:.2f} %, on {names[lowest]}.")
    return (*sentences, "These sets are not groups of people: their accuracies do not tell whether the model is fair.")


def _who(results: Results, best: int) -> str:
    values, title = _values(results)[best], results.models[best].title
    worst = _lowest(values)
    others = len(results.models) - 1
    model = f"{title}, the model of the best average," if others else title
    if len(worst) == len(values):
        return (
            f"No group is worse off than another: {model} decides {values[0]:.2f} % of the pairs of each group "
            "correctly."
        )
    names = _names(results)
    alike = sum(_lowest(row) == worst for row in _values(results))
    also = f"; the same holds for {alike} of all {others + 1} models" if others else ""
    who = listed([names[k] for k in worst])
    return (
        f"Worst off {'is' if len(worst) == 1 else 'are'} {who}: {model} decides "
        f"{values[worst[0]]:.2f} % of {'its' if len(worst) == 1 else 'their'} pairs correctly, the least of all "
        f"groups{also}."
    )


def _by_how_much(results: Results, best: int) -> str:
    values, names = _values(results)[best], _names(results)
    low, high = int(values.argmin()), int(values.argmax())
    if values[high] - values[low] <= SAME:
        return "The difference between the groups' accuracies is 0.00 points."
    places = np.flatnonzero(results.whole)
    gap = results.gap(best, places[low], places[high])
    ser = summary(values)[2]
    errors = f"{ser:.2f} times as many errors" if np.isfinite(ser) else f"errors where {names[high]} has none"
    interval = (
        ""
        if results.has_few
        else f" (95 % interval {gap.low:.2f} to {gap.high:.2f}, for these two, which were chosen as the extremes)"
    )
    return f"That is {gap.value:.2f} points below {names[high]}, the best-off group{interval}, and {errors}."


def _chance(results: Results, best: int) -> str:
    if results.has_few:
        return "The pairs are too few to tell whether this is chance."
    if results.collapsed(results.models[best]):
        return "The model is collapsed (see the note under the accuracies): nothing follows for its fairness."
    values = [tuple(row) for row in _values(results).tolist()]
    average, std, ser = summary(values[best])
    chance = by_chance(average, results.pairs)
    within = [is_within_chance(one, results.pairs) for one in values]
    verdict = "This can be chance" if within[best] else "This is more than chance"
    count, of = sum(not one for one in within), len(within)
    more = f"; more than chance is seen in {count} of {of} models" if of > 1 else ""
    if len(_lowest(_values(results)[best])) == len(values[best]):
        bounds = results.intervals[best, results.whole]
        return (
            "Equal accuracies do not prove that the model is fair: each is known only within its 95 % interval, and "
            f"these reach from {bounds.min():.2f} to {bounds.max():.2f} %{more}."
        )
    return (
        f"{verdict}: of 100 perfectly fair models of the same average, 95 have an STD up to {chance.std_95:.2f} and "
        f"95 an SER up to {_ratio(chance.ser_95)} on as many independent pairs; this one has {std:.2f} and "
        f"{_ratio(ser)}{more}."
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "infinity"


def _lowest(values: np.ndarray) -> list[int]:
    """Returns the indices of the groups with the lowest accuracy."""
    return np.flatnonzero(values <= values.min() + SAME).tolist()


def _values(results: Results) -> np.ndarray:
    """Returns the accuracies (models, groups) of the groups that are part of averages."""
    return results.accuracies[:, results.whole]


def _names(results: Results) -> list[str]:
    return [name for name in results.same if name not in results.lacking]

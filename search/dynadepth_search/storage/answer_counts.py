"""What the generated answers of labels came to, in numbers of prompts."""

from dynadepth_search.storage.labels import Labels

__all__ = ["answer_counts"]


def answer_counts(labels: Labels) -> dict[str, int]:
    """Count right answers among the prompts whose labels generated answers confirmed.

    Returns:
        `answered_prompts`: prompts that were answered. `base_right`, `raw_right` and `labels_right`: those of them that
        the identity plan, the raw label and the label answer right. `fixes_found`: prompts that the raw label answers
        right and the identity does not. `fixes_confirmed`: prompts whose label answers them right, and every variant
        too, and the identity does not. `losses_avoided`: prompts that the identity answers right and the raw label does
        not.
    """
    names = ("base_right", "raw_right", "labels_right")
    counts = dict.fromkeys(
        ("answered_prompts", *names, "fixes_found", "fixes_confirmed", "losses_avoided"), 0
    )
    plans = zip(labels.candidates, labels.plans, labels.raw_plans, strict=True)
    for candidates, label, raw in plans:
        known = {item.plan: item for item in candidates if item.right}
        if not known:
            continue
        ones = "1" * len(label)
        base, found, chosen = (
            known[plan] for plan in (ones, "".join(map(str, raw)), "".join(map(str, label)))
        )
        counts["answered_prompts"] += 1
        for name, item in zip(names, (base, found, chosen), strict=True):
            counts[name] += item.right[0]
        counts["fixes_found"] += found.right[0] > base.right[0]
        counts["fixes_confirmed"] += chosen.fixes(base)
        counts["losses_avoided"] += base.right[0] > found.right[0]
    return counts

"""Tables of the numbers in a run's files, in loggers and in the ledger, made from `lab.docs.generated.quantities`."""

from lab.docs.generated import quantities, table


def markdown() -> str:
    """Return one section for each file of a run, with a table of its numbers."""
    parts = []
    for title, content in quantities.FILES.items():
        rows = [[", ".join(f"`{key}`" for key in q.keys), q.unit, q.meaning] for q in content]
        unit = any(q.unit for q in content)
        headings = ["key", "unit", "meaning"]
        parts += [f"### {title}", table(headings if unit else headings[::2], rows if unit else [r[::2] for r in rows])]
    return "\n\n".join(parts)

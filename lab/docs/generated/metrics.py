"""The numbers of a run's files, of loggers and of the ledger, from generated.quantities."""

from lab.docs.generated import quantities, table


def markdown() -> str:
    """Return a section with a table for each file."""
    parts = []
    for title, content in quantities.FILES.items():
        rows = [[", ".join(f"`{key}`" for key in q.keys), q.unit, q.meaning] for q in content]
        unit = any(q.unit for q in content)
        headings = ["key", "unit", "meaning"]
        parts += [f"### {title}", table(headings if unit else headings[::2], rows if unit else [r[::2] for r in rows])]
    return "\n\n".join(parts)

"""A report as text, JSON and HTML."""


def as_json(layers, findings): ...
def as_html(report): ...
def as_text(layers, findings):
    return "\n".join(f"{f.severity} {f.layer} {f.channels} {f.rule}: {f.message} {f.evidence}" for f in findings)

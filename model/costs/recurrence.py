"""What it costs to apply layers several times, and to let tokens halt. Free of torch."""

from model.config.transformer import TransformerConfig
from model.costs.parts import Part, Shape

Layers = list[tuple[int, list[Part]]]


def repeated(config: TransformerConfig, layers: Layers) -> Layers:
    """Layers as often as they are applied; their parameters are there once."""
    again = config.recurrence.steps - 1
    further = [(number * again, [part._replace(parameters=0) for part in of]) for number, of in layers]
    return layers + further if again else layers


def recurrence(shape: Shape, tokens: int, streams: int = 1) -> list[Part]:
    """The vectors of the steps, and the halting unit after each step but the last, 2 C FLOPs a token."""
    config = shape.transformer
    options, width = config.recurrence, config.width
    if options.steps == 1:
        return []
    parts = [Part("step table", options.steps * streams * width)] if options.step_embedding == "learned" else []
    if options.halt:
        again, numbers = options.steps - 1, shape.held(tokens)
        saved = options.steps * (shape.vectors(tokens) + numbers * (shape.size + 1)) + again * numbers * 5
        if shape.size < 4:  # the unit reads and multiplies in fp32
            saved += again * shape.vectors(tokens, 4)
        parts.append(Part("halting", width + 1, again * tokens * 2 * width, saved))
    return parts

"""A question about pictures, which the tests of profilers ask."""

from tests.contracts.support import picture

QUESTION = "is the 7 red?"
PICTURES = [picture(1, (40, 60)), picture(2, (66, 40))]
SHOWN = [*PICTURES, picture(3, (50, 50))]


def alone(vlm, shown):
    batch = vlm.encode([QUESTION], [[shown]])
    return batch, vlm.layout(batch)

"""Trees of well-known models at full size, on the meta device, at 80, 120 and 200 columns."""

import pytest
from rich.cells import cell_len

import deltakit as dk
from support.golden import golden
from support.large_models import MODELS, with_delta

WIDTHS = (80, 120, 200)


@pytest.mark.parametrize("name", MODELS)
def test_golden_renders_at_full_size(name, unchecked):
    model = with_delta(name)
    texts = {width: str(dk.show(model, width=width)) for width in WIDTHS}
    for width, text in texts.items():
        lines = text.splitlines()
        assert max(map(cell_len, lines)) <= width
        # Every row says its state, or that it is tied.
        assert all(set("●○◐Δ") & {*line[-10:]} or line.endswith("tied") for line in lines if line[0] in "r├└│ ")
    golden(f"sizes/{name}", "\n\n".join(f"{width} columns\n\n{text}" for width, text in texts.items()))

"""Spreads of a measurement (median, least and greatest over repeats), as result files hold them."""

Spread = dict[str, float]
COLUMNS = ("median", "least", "greatest")


def figures(spread: Spread, digits: int = 3) -> list[str]:
    """The three as text, in the order of `COLUMNS`."""
    return [f"{spread[key]:.{digits}f}" for key in COLUMNS]


def inverse(spread: Spread) -> Spread:
    """The spread of a ratio turned over; its median too, which is a sample's as long as repeats are odd in number."""
    return {"median": 1 / spread["median"], "least": 1 / spread["greatest"], "greatest": 1 / spread["least"]}

"""Names of evaluation protocols, as results have them."""

FINE_TUNE, LABEL_FREE = "fine_tune", "label_free"
NOISE_ONLY = "noise_only"  # the baseline of an encoder that no client has trained, with the run's noise
ON = "@"  # between the name of a protocol and that of one of the data sets of evaluation.data


def split_protocol(name: str) -> tuple[str, str]:
    """Return a protocol and the data set that its name has after ``protocol_on``, or "" for the clients' own."""
    protocol, _, data = name.partition(ON)
    return protocol, data


def protocol_on(protocol: str, data: str) -> str:
    """Return the name of a protocol on one of the data sets of ``evaluation.data``, or on the clients' own ("")."""
    return f"{protocol}{ON}{data}" if data else protocol

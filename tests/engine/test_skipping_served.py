"""Skipping where each layout has a KV-cache group of its own; apart, since one engine is watched at a time."""

from tests.engine.test_skipping import SETTINGS, run_a_mixed_batch, settings_of, start


def test_served_with_freed_blocks_it_equals_the_reference(embedded, tokens):
    _, settings = settings_of("window, filtered tail", embedded.num_layers)
    monkeypatch, engine = start(embedded, SETTINGS["window, filtered tail"])
    try:
        engine.settings = settings
        assert len(engine.builders()) > 1, "layers of different layouts need groups of their own"
        run_a_mixed_batch(engine, embedded.model, tokens, "served")
        table = engine.status()["layer_table"]
        assert [(row["layers"], row["kept_per_chunk"], row["skip_ratio"]) for row in table] == [
            ("0-9", 64, 0.3),
            ("10-29", 16, 0.3),
        ]
    finally:
        engine.close()
        monkeypatch.undo()

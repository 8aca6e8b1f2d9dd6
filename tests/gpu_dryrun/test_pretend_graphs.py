"""Pretended CUDA graphs do what CUDA graphs do: the addresses and numbers of the capture, at each replay."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def graphs(monkeypatch):
    """The module, its hook on Triton's launches in place for the test."""
    monkeypatch.setattr(InterpretedFunction, "run", InterpretedFunction.run)
    module = importlib.reload(importlib.import_module("tests.gpu_dryrun.pretend_graphs"))
    module.note_launches()
    with torch.inference_mode():
        yield module


@InterpretedFunction
def _add_kernel(source, target, number, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(target + offsets, tl.load(source + offsets) + number)


def captured(graphs, forward):
    graph = graphs.Graph()
    with graphs.capture(graph):
        forward()
    return graph


def test_a_capture_writes_nothing_and_a_replay_reads_what_lies_there_then(graphs):
    given, output = torch.ones(4), torch.zeros(4)
    number = 1

    def forward():
        doubled, added = given * 2, torch.empty(4)
        _add_kernel[lambda meta: (1,)](doubled, added, number, SIZE=4)
        output[:] = torch.nn.functional.linear(added[None], torch.eye(4))[0]

    graph = captured(graphs, forward)
    assert output.tolist() == [0] * 4
    given.fill_(3)
    number = 100  # Python does not run again
    graph.replay()
    assert output.tolist() == [7] * 4
    given.fill_(5)
    graph.replay()
    assert output.tolist() == [11] * 4
    assert graphs.counts["replayed whole"] == 2


def test_a_tensor_that_is_new_in_each_step_is_not_seen(graphs):
    given, output = torch.ones(4), torch.zeros(4)
    graph = captured(graphs, lambda: output.copy_(given + 1))
    old, given = given, torch.full((4,), 9.0)
    graph.replay()
    assert output.tolist() == [2] * 4
    del old
    with pytest.raises(RuntimeError, match="was freed since"):
        graph.replay()


def test_what_a_graph_made_is_undefined_until_it_makes_it_again(graphs):
    output, made = torch.zeros(4), []

    def forward():
        made.append(torch.empty(4))
        output.copy_(made[0])
        made[0].fill_(1)

    graph = captured(graphs, forward)
    graph.replay()
    graph.replay()
    assert output.isnan().all() and made[0].tolist() == [1] * 4


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), torch.nonzero, lambda x: bool(x.any())])
def test_a_capture_refuses_what_waits_for_the_device(graphs, read):
    with pytest.raises(RuntimeError, match="reads from the device"):
        captured(graphs, lambda: read(torch.ones(4)))


def test_an_action_is_done_at_each_replay(graphs):
    done = []
    graph = captured(graphs, lambda: graphs.at_replay(lambda: done.append("then")))
    assert done == []
    graph.replay()
    graphs.at_replay(lambda: done.append("now"))
    assert done == ["then", "now"]


def test_pieces_end_and_begin_inside_an_operation_and_note_what_is_theirs(graphs):
    """As vLLM's pieces do around an attention (`compilation/breakable_cudagraph.py`)."""
    given, between, output = torch.ones(4), torch.zeros(4), torch.zeros(4)
    pieces = [graphs.Graph(), graphs.Graph()]

    def attention(query):
        pieces[0].capture_end()
        eager(query)
        pieces[1].capture_begin()
        torch.mul(query, 1)  # what follows in the operation is the second piece's

    def eager(query):
        between.copy_(query + 1)

    library = torch.library.Library("test_pieces", "DEF")
    library.define("attention(Tensor query) -> ()")
    library.impl("attention", attention, "CompositeExplicitAutograd")
    graphs.bodies["test_pieces::attention"] = attention
    pieces[0].capture_begin()
    query = given * 2
    torch.ops.test_pieces.attention(query)
    output.copy_(between * 10)
    pieces[1].capture_end()
    given.fill_(3)
    pieces[0].replay()
    eager(query)
    pieces[1].replay()
    assert output.tolist() == [70] * 4
    assert [len(piece.actions) for piece in pieces] == [1, 3]

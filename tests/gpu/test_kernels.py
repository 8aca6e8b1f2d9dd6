"""The kernels on a GPU: the cases of tests/kernels/gpu/test_seal.py, against the reference and the CPU path."""

import pytest

pytest.importorskip("triton")

from tests.kernels.gpu.test_seal import (  # noqa: F401
    test_a_seal_equals_the_reference_and_touches_no_other_slot,
    test_chunks_taken_over_sealed_are_left_alone_and_the_next_has_no_predecessors,
    test_of_equal_redundancies_the_older_tokens_stay_and_no_number_goes_first,
    test_the_cpu_path_chooses_the_same_tokens,
    test_the_devices_lengths_slots_and_tables_are_those_of_the_layout,
    test_two_ranks_with_half_the_heads_each_choose_as_one_with_all,
    test_what_stays_does_not_depend_on_how_the_sequence_is_cut_into_steps,
)

pytestmark = pytest.mark.gpu

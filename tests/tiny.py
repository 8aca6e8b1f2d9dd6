"""A small random Llama whose heads can be split over two ranks: four query heads, two KV heads, four layers."""

#: Bytes of one block of 32 tokens in float32: four layers, two KV heads of 32, keys and values.
BLOCK_BYTES = 32 * 4 * 2 * 32 * 2 * 4


def save(folder, tokenizer, **changes):
    """Write it with another model's tokenizer; seeded, with logits far enough apart for greedy text to be stable.

    `changes` go into its configuration.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)

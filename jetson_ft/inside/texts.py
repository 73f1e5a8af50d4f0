"""The texts of the drawn views. `{names}` in them are filled in by the drawing."""

from __future__ import annotations

from collections.abc import Callable

from jetson_ft.errors import _

_TEXTS = {
    # Heading and caption of each view.
    "tokens_heading": _("Tokens"),
    "tokens_caption": _(
        "A model reads numbers, not letters: a text becomes tokens, pieces of it that have a "
        "number each. Pieces that the tokenizer's own data had often are long; rare characters "
        "fall apart into bytes, so that the same sentence costs more."
    ),
    "attention_heading": _("Attention"),
    "attention_caption": _(
        "In each layer every token takes up something of the tokens before it; the map shows how "
        "much of each. Each head has a pattern of its own, and fine-tuning moves it a little."
    ),
    "attention_example_heading": _("Attention, by numbers"),
    "attention_example_caption": _(
        "A head compares the token's query with the key of each token before it; softmax makes "
        "shares of the results, and the values are added up by these shares. All numbers are the "
        "model's own."
    ),
    "next_token_heading": _("Next token"),
    "next_token_caption": _(
        "A model gives each token of its vocabulary a probability of coming next, and a reply "
        "draws one token after another. Temperature, top-k and top-p reshape that distribution "
        "and cut its tail before the draw."
    ),
    "reply_heading": _("A reply, token by token"),
    "reply_caption": _(
        "Base and adapter read the same reply, and each gives the probability of its next token. "
        "Where the two lines part is where fine-tuning changed the model."
    ),
    "in_context_heading": _("Examples in the prompt"),
    "in_context_caption": _(
        "The same question is asked without examples, with one, and with several: no weight "
        "changes, only what the model reads before it. Compare what the examples do with what the"
        " adapter does."
    ),
    "numbers_heading": _("Numbers"),
    "numbers_caption": _(
        "The sizes of this model follow from a few dimensions. They say which formats fit, and "
        "why LoRA needs so much less memory than training every weight."
    ),
    "quantization_heading": _("Quantization"),
    "quantization_caption": _(
        "Fewer bits for a weight mean fewer values that it can take: 256 in int8, 16 in nf4, each"
        " times a scale of its row or block. The errors are measured with the kernels that a "
        "quantized model is loaded with."
    ),
    "adapter_heading": _("The adapter"),
    "adapter_caption": _(
        "LoRA adds a product of two small matrices, BA, to each weight matrix W. Its size beside "
        "W shows which layers changed most, and its singular values how many directions the "
        "change needs."
    ),
    # Both sides.
    "base": _("Base"),
    "adapter": _("Adapter"),
    "side": _("Model"),
    "layer": _("Layer"),
    "head": _("Head"),
    "probability": _("Probability"),
    "total": _("Total"),
    "share": _("Share"),
    # Tokens
    "tokens": _("Tokens"),
    "characters": _("Characters"),
    "per_character": _("Tokens per character"),
    "per_chinese": _("per Chinese character"),
    "per_latin": _("per Latin letter"),
    "choose_token": _("Point at a token, or use the arrow keys."),
    "text_as_tokens": _("The text as tokens"),
    "text_as_tokens_note": _(
        "A dot is a space, an arrow the end of a line; 猫₁ and 猫₂ are parts of a character, and "
        "‹e7› is a byte."
    ),
    "show": _("Show"),
    "text": _("Text"),
    "ids": _("IDs"),
    "bytes": _("Bytes"),
    "token_id": _("id {id}"),
    "token_bytes": _("bytes {bytes}"),
    "special": _("control token"),
    "context": _("context"),
    "trained_on": _("trained on"),
    "split_title": _("Characters in several tokens"),
    "split_note": _(
        "Each colour is a token; the numbers are bytes of UTF-8, of which a Chinese character has"
        " three."
    ),
    # Attention
    "map_title": _("Attention from token to token"),
    "map_note": _(
        "A row is the token that attends, a column a token that it attends to; each row adds up "
        "to 100 %. Later tokens are masked; the scale widens small values."
    ),
    "query_token": _("token that attends (query)"),
    "key_token": _("token attended to (key)"),
    "rollout": _("all layers (rollout)"),
    "rollout_note": _(
        "The maps of all layers multiplied: how much of each token reaches the top. Over many "
        "layers nearly all comes from the first token, which is left out: the shares are of the "
        "rest."
    ),
    "left_out": _("{token} is left out."),
    "masked_or_first": _("masked, or the first token"),
    "head_mean": _("mean of all heads"),
    "masked": _("{to} is masked for {from}: it comes later."),
    "masked_short": _("masked"),
    "attention_of": _("{from} attends to {to}: {value}"),
    "flow_title": _("What one token takes up"),
    "flow_note": _(
        "Choose a row of the map, or a token here: the colour of the others is its attention to "
        "them."
    ),
    "attends": _("Attention of {token}:"),
    "heads_title": _("All heads of this layer"),
    "heads_note": _(
        "Along the diagonal a head attends to the token itself or the one before it; a strong "
        "first column means that the head has nothing else to attend to."
    ),
    "example_where": _("Layer {layer}, head {head}, which reads key and value head {key_head}."),
    "example_vectors": _("1. Query, key and value"),
    "example_vectors_note": _(
        "The query of {from}, and key and value of {to}: {size} numbers each. Blue is positive, "
        "orange negative; the position is turned into query and key (rotary embedding), where the"
        " model does that."
    ),
    "example_score": _("2. Scores become shares"),
    "example_score_note": _(
        "The product of query and key is scaled down, and softmax makes shares of all the scores "
        "in the row."
    ),
    "example_sum": _("3. The sum of the values"),
    "example_sum_note": _(
        "The head's output is the sum of all values, each times its share. The softmax above "
        "differs from the model's own by at most {difference}."
    ),
    # Next token
    "prompt_title": _("The prompt"),
    "prompt_note": _("{count} tokens: the text in the model's chat template, where it has one."),
    "candidates_title": _("The likeliest tokens"),
    "candidates_note": _(
        "Choose a step: bars are the probabilities after it, lines those before any. The framed "
        "token is the one that a greedy reply takes."
    ),
    "after_step": _("After"),
    "before_sampling": _("before any step"),
    "cut": _("cut"),
    "step": _("Step"),
    "steps_title": _("Step by step"),
    "steps_note": _(
        "Each step is the one that generation itself applies. Entropy is the uncertainty of the "
        "draw: 1 bit is that of a coin."
    ),
    "step_model": _("the model"),
    "step_repetition_penalty": _("repetition penalty"),
    "step_temperature": _("temperature"),
    "step_top_k": _("top-k"),
    "step_top_p": _("top-p"),
    "kept": _("Tokens left"),
    "entropy": _("Entropy, bits"),
    "logit": _("logit {value}"),
    "step_summary": _(
        "Tokens left: {kept}. Entropy: {entropy} bits. The tokens shown have {shown} of the "
        "model's probability."
    ),
    # A reply
    "nats_of": _("{side}: surprise in nats"),
    "most_different": _("Most different"),
    "chance_of": _("{side}: {value}, rank {rank}"),
    "divergence_of": _("difference {value} bits"),
    "stepped_title": _("The reply"),
    "stepped_note": _(
        "Choose a token to see what else each side would have written there. The three coloured "
        "ones are where the two differ most."
    ),
    "previous": _("Previous token"),
    "following": _("Next token"),
    "chances_title": _("How likely each token was"),
    "chances_note": _(
        "The probability of the token that stands in the reply, given all before it."
    ),
    "position": _("Token of the reply"),
    "divergence_title": _("Where the two disagree"),
    "divergence_note": _(
        "The Jensen-Shannon divergence of the two distributions: 0 bits where they are equal, 1 "
        "bit where they have nothing in common."
    ),
    "bits_unit": _("Bits"),
    # In context
    "question": _("The question"),
    "answer_given": _("Answer to compare with: {answer}"),
    "zero_shot": _("No example"),
    "one_shot": _("One example"),
    "few_shot": _("{count} examples"),
    "prompt_tokens": _("{count} tokens in the prompt"),
    "answer_probability": _("The given answer: {value} a token, {bits} bits a character"),
    # Numbers
    "parameters": _("Parameters"),
    "layers": _("Layers"),
    "hidden": _("Hidden size"),
    "mlp_width": _("MLP width"),
    "heads": _("Heads"),
    "vocabulary": _("Vocabulary"),
    "part": _("Part"),
    "part_embedding": _("Embedding"),
    "part_attention": _("Attention"),
    "part_mlp": _("MLP"),
    "part_norms": _("Norms"),
    "part_other": _("Biases and others"),
    "part_head": _("LM head"),
    "weights_title": _("Weights by part and format"),
    "weights_note": _(
        "int8 and nf4 are those of the linear layers, with their scales; embedding, head and "
        "norms stay in 16 bits."
    ),
    "weights_note_tied": _(
        "int8 and nf4 are those of the linear layers, with their scales; embedding and norms stay"
        " in 16 bits. The head is the embedding, used twice."
    ),
    "training_title": _("Memory of training"),
    "training_note": _(
        "{tokens} tokens at a time. LoRA of rank {rank} trains {adapter} parameters: the others "
        "need neither gradient nor optimizer."
    ),
    "free": _("free on {device}: {size}"),
    "method_full": _("Every weight"),
    "method_lora": _("LoRA"),
    "method_qlora": _("QLoRA"),
    "memory_weights": _("weights"),
    "memory_gradients": _("gradients"),
    "memory_optimizer": _("optimizer"),
    "memory_activations": _("activations"),
    "memory_other": _("libraries and buffers"),
    "boards_title": _("On several boards"),
    "boards_note": _(
        "Memory of each board. Copies (data parallel) train on more rows at a time; parts "
        "(sharded) let a model fit that is too large for one board."
    ),
    "training_of": _("Training of"),
    "data_parallel": _("Data parallel: a copy on each"),
    "data_parallel_note": _("Gradients are summed over the network after each step."),
    "sharded": _("Sharded: a part on each"),
    "sharded_note": _("Each layer's weights are gathered over the network when their turn comes."),
    "one_board": _("1 board"),
    "n_boards": _("{count} boards"),
    # Quantization
    "matrix": _("Weight matrix"),
    "format": _("Format"),
    "before": _("before"),
    "weight": _("Weight"),
    "weights_count": _("Number of weights"),
    "histogram_title": _("{rows} × {columns} weights before and after"),
    "histogram_note": _(
        "Most weights are close to zero. With 4 bits the shape is kept, and each single weight is"
        " off by a few percent of the largest."
    ),
    "levels_title": _("nf4's 16 levels"),
    "levels_note": _(
        "Each block of 64 weights is divided by its largest. The levels are closer together where"
        " such weights are more frequent."
    ),
    "over_largest": _("Weight over the largest of its block"),
    "bits": _("Bits a weight"),
    "max_error": _("Largest error"),
    "rms_error": _("RMS error"),
    "snr": _("Signal to noise"),
    "error": _("error"),
    "block_title": _("One block of 64 weights in nf4"),
    "block_note": _(
        "The weights in order of size. Each becomes the nearest of the 16 levels times the "
        "block's scale: the flat steps."
    ),
    "block_axis": _("Weights of the block, smallest first"),
    # The adapter
    "most_changed": _("Most changed"),
    "layer_target": _("{target}, layer {layer}"),
    "its_change": _("Its change"),
    "mean_effective_rank": _("Mean effective rank"),
    "of_rank": _("{value} of {rank}"),
    "scale": _("Scale"),
    "target": _("target"),
    "measure": _("Metric"),
    "relative_norm": _("size of the change (norm of BA over W)"),
    "effective_rank": _("effective rank"),
    "rank_90": _("values that hold 90 %"),
    "no_adapter": _("no adapter"),
    "change_title": _("The change of each layer"),
    "change_note": _("Click a cell, or press Enter on it, to see its singular values below."),
    "change_note_dora": _(
        "Click a cell, or press Enter on it, to see its singular values below. DoRA also rescales"
        " each row, which isn't counted here."
    ),
    "singular_title": _("How many directions the change needs"),
    "singular_note": _(
        "Each value is the strength of one direction. Where they fall off early, a smaller rank "
        "would have been enough; where they are flat, all of it is used."
    ),
    "singular_index": _("Direction"),
    "singular_value": _("Singular value"),
    "same_target": _("{target} of the other layers"),
    "rank_used": _(
        "Effective rank {effective}; {most} of {rank} values hold 90 % of the sum of squares."
    ),
}


def view_texts(translate: Callable[[str], str]) -> dict[str, str]:
    """Return the texts of all views in the language of `translate`, by name."""
    return {name: translate(text) for name, text in _TEXTS.items()}

"""What of a conversation is trained, found the slow way: with transformers' apply_chat_template alone."""


def by_marks(tokenizer, messages, **options):
    """(ids, mask) by the marks of the template."""
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **options)
    return found["input_ids"], [bool(value) for value in found["assistant_masks"]]


def by_turns(tokenizer, messages, only_last=False, **options):
    """A list of (ids, mask): the whole conversation, and each turn that is written in another way when it is the last.

    Tokens are compared, not texts: what the model would see as prompt, and what it would then have to say up to and
    including the token that ends its turn.
    """

    def ids_of(part, **more):
        return tokenizer.apply_chat_template(part, return_dict=True, **more, **options)["input_ids"]

    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, turn = ids_of(messages[:index], add_generation_prompt=True), ids_of(messages[: index + 1])
            assert turn[: len(prompt)] == prompt
            turns.append((turn, range(len(prompt), len(turn) - turn[::-1].index(end))))
    turns = turns[-1:] if only_last else turns
    whole, documents = ids_of(messages), []
    while turns:
        inside = [turn for turn in turns if whole[: len(turn[0])] == turn[0]]
        if inside:
            trained = {place for _, places in inside for place in places}
            documents.append((whole, [place in trained for place in range(len(whole))]))
        turns = [turn for turn in turns if turn not in inside]
        whole = turns[-1][0] if turns else whole
    return documents[::-1]

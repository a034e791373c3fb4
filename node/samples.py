"""samples.jsonl: at every step one group of responses, with rewards, advantages and the gamma of each token.

A line is made in two parts. train_step has the numbers (choose_sample). The run has the tokenizer (spell_sample), which
turns token numbers into text.
"""

from torch import Tensor

MOST_TOKENS = 400  # of one response, and of the prompt: what is beyond is only counted
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for a character whose other bytes are still to come
WINDOW = 5  # tokens; a character has at most four bytes, so it is finished after four tokens


def choose_sample(rollouts: list, rewards: Tensor, advantages: Tensor, gamma: Tensor, mask: Tensor) -> dict:
    """One group of a step: the first of unequal reward, because it teaches; if there is none, the first.

    rollouts [B], B = P * G; rewards [P,G]; advantages [B]; gamma and mask [B,N].
    """
    is_unequal = (rewards != rewards[:, :1]).any(1)  # [P]
    p, group_size = int(is_unequal.int().argmax()), rewards.shape[1]
    responses = []
    for b in range(p * group_size, (p + 1) * group_size):
        response = {
            "ids": rollouts[b].ids[:MOST_TOKENS],
            "length": len(rollouts[b].ids),
            "truncated": rollouts[b].truncated,
            "reward": rewards.flatten()[b].item(),
            "advantage": advantages[b].item(),
            "gamma": gamma[b][mask[b]][:MOST_TOKENS].tolist(),
        }
        responses.append(response)
    return {"prompt_ids": rollouts[p * group_size].prompt_ids, "responses": responses}


def spell_sample(sample: dict, tokenizer) -> dict:
    """A line of samples.jsonl: what choose_sample returned, with text in place of token numbers.

    prompt: its last tokens as text. Of each response: tokens, a text for each; left_out, how many more there were.
    """
    prompt_ids = sample["prompt_ids"]
    responses = [
        {
            "reward": round(response["reward"], 4),
            "advantage": round(response["advantage"], 4),
            "truncated": response["truncated"],
            "left_out": response["length"] - len(response["ids"]),
            "tokens": split_text(response["ids"], tokenizer),
            "gamma": [round(gamma, 3) for gamma in response["gamma"]],
        }
        for response in sample["responses"]
    ]
    return {
        "prompt": tokenizer.decode(prompt_ids[-MOST_TOKENS:]),
        "prompt_left_out": max(len(prompt_ids) - MOST_TOKENS, 0),
        "responses": responses,
    }


def split_text(ids: list[int], tokenizer) -> list[str]:
    """The text of each token; joined, they are the text of all.

    A token alone is not enough. Some tokenizers drop the space before a text's first token, so a token is decoded
    together with the one before it. And a character can have its bytes in several tokens: then the last of them gets
    the character, the others get "".
    """
    texts, start, done = [], 0, 0  # ids[start:done] is before what is decoded next, and its text is known
    for end in range(1, len(ids) + 1):
        known, longer = (tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for stop in (done, end))
        is_unfinished = longer.endswith(UNFINISHED) and end - done < WINDOW and end < len(ids)
        if is_unfinished:
            texts.append("")
        else:
            texts.append(longer[len(known) :])
            start, done = done, end
    return texts

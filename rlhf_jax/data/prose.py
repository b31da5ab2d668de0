"""Prose out of the tokenised, lower-cased text of old corpora."""


def detokenize(text: str) -> str:
    """Returns the text of an old, lower-cased corpus as prose.

    `it 's good , is n't it ?` becomes `It's good, isn't it?`: undoes the Penn Treebank's spacing
    (contractions, punctuation, brackets, quotation marks), and capitalises `i` and the beginning of
    sentences; names stay as they are.
    """
    prose = ""
    glue_next, sentence_starts, quote_open = True, True, False
    for token in text.split():
        opens = token in OPENING or (token == '"' and not quote_open)
        closes = token in CLOSING or (token == '"' and quote_open)
        if token == '"':
            quote_open = not quote_open
        word = REWRITTEN.get(token, token)
        if sentence_starts and word[0].isalpha():
            word, sentence_starts = word[0].upper() + word[1:], False
        elif word[0].isdigit():
            sentence_starts = False
        prose += word if glue_next or closes else " " + word
        glue_next = opens
        sentence_starts = sentence_starts or token in SENTENCE_ENDS
    return prose


REWRITTEN = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "``": '"', "''": '"', "`": "'", "i": "I"}
OPENING = {"-lrb-", "-lsb-", "(", "[", "``", "`", "$"}
CLOSING = {"-rrb-", "-rsb-", ")", "]", "''", "'", ",", ".", ";", ":", "!", "?", "...", "%"}
CLOSING |= {"n't", "'s", "'re", "'ve", "'ll", "'d", "'m"}  # contractions
SENTENCE_ENDS = {".", "!", "?"}

"""Texts on which the logits of engine and checkpoint are compared: prose, code, numbers."""

TEXTS = (
    "The engine was built in the morning and had to prove itself before noon. Nobody in the workshop "
    "doubted the drawings, but the old foreman had seen too many machines that ran well on paper. So they "
    "fed it the same ten questions they had put to the first machine, and wrote down every answer, digit "
    "by digit, in two columns. Where the columns agreed, an apprentice drew a line under them; where they "
    "did not, he called out, and everybody stopped. He called out twice. The first time it was his own "
    "hand: he had read a seven for a one. The second time a wheel had been filed too far, by less than the "
    "width of a hair, and the answer was wrong only in its last place. 'Nobody will ever see that,' said the "
    "young engineer. 'I have seen it,' said the foreman, 'and tomorrow it will be in the place before the "
    "last.' They took the wheel out, and it was evening when the columns agreed from top to bottom.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
    "\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n"
    "            raise IndexError('pop from an empty stack')\n        return self.items.pop()\n\n\n"
    "for n in (1, 10, 90):\n    print(f'{n:>3}: {fibonacci(n)}')\n",
    "In 1687, 3 of the 12 towns paid £45.50; the other 9 paid nothing at all. By 1701 the debt was £1,204, "
    "of which Ashford owed 38 %, Brampton 21 %, and the rest was lost. Question: who paid first? Answer: the "
    "three that had a market, because the king's men came there every Tuesday and Friday.",
)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.curate.document import Document
from sparing.curate.pii import PII, iban, luhn

MASKED = {
    "Write to jane.doe+news@mail.example.co.uk.": "Write to email@example.com.",
    "<a_b%c@x-y.org>": "<email@example.com>",
    "from 8.8.8.8, not": "from 192.0.2.1, not",
    "at 2001:4860:4860::8888 too": "at 192.0.2.1 too",
    "Ends with 93.184.216.34.": "Ends with 192.0.2.1.",
    "Call +44 20 7946 0958 now": "Call [phone number] now",
    "Call +1 (212) 736-5000.": "Call [phone number].",
    "(212) 736-5000 or 212-736-5000 or 1-212-736-5000": "[phone number] or [phone number] or [phone number]",
    "Visa 4111 1111 1111 1111, thanks": "Visa [card number], thanks",
    "5555-5555-5555-4444 378282246310005": "[card number] [card number]",
    "Pay GB82 WEST 1234 5698 7654 32 TODAY": "Pay [IBAN] TODAY",
    "DE89370400440532013000.": "[IBAN].",
    "NO9386011117947 and FR14 2004 1010 0505 0001 3M02 606": "[IBAN] and [IBAN]",
}
KEPT = [
    "an @ sign, a@b, user@localhost",
    "192.168.0.1 and 10.0.0.1 and 127.0.0.1",  # private
    "192.0.2.17 and 2001:db8::1",  # for examples
    "version 1.2.3.4.5 and 256.1.1.1 and 1.2.3",
    "at 12:30:45 or std::vector<int>:: and a::b",
    "4111 1111 1111 1112",  # the check digit is wrong
    "9111 1111 1111 1111 1111",  # no issuer
    "GB82 WEST 1234 5698 7654 33 and GB82 WEST 1234",
    "in 1990-2005, 1,234,567,890 people, 3.14159265358979",
    "+3 +45 a+123456789",
    "212 736 5000 items",
    "ISBN 978-3-16-148410-0",
    "email@example.com 192.0.2.1 [card number]",  # masks stay
]


@pytest.mark.parametrize(("text", "expected"), MASKED.items())
def test_masked(text, expected):
    document = Document(text)
    scores = PII().scores(document)
    assert PII().edit(document).text == expected
    assert sum(scores.values()) == sum(expected.count(mask) for mask in ("email@example.com", "192.0.2.1", "[phone", "[card", "[IBAN]"))
    assert PII().verdict(scores) is None


@pytest.mark.parametrize("text", KEPT)
def test_kept(text):
    document = Document(text)
    assert PII().edit(document) is document
    assert not any(PII().scores(document).values())


def test_a_kind_can_be_left_or_masked_otherwise():
    text = "a@b.org 8.8.8.8"
    assert PII(email=None, ip="IP").edit(Document(text)).text == "a@b.org IP"


@settings(deadline=None)
@given(st.integers(10**14, 10**15 - 1))
def test_luhn_finds_every_changed_digit(number):
    digits = str(number)
    right = next(d for d in "0123456789" if luhn(digits + d))
    assert sum(luhn(digits + d) for d in "0123456789") == 1
    changed = str((int(digits[3]) + 1) % 10)
    assert not luhn(digits[:3] + changed + digits[4:] + right)


@settings(deadline=None)
@given(st.text("0123456789", min_size=18, max_size=18))
def test_iban_has_one_right_pair_of_check_digits(account):
    assert sum(iban(f"DE{check:02d}{account}") for check in range(2, 99)) == 1


@settings(deadline=None)
@given(st.text(st.sampled_from("ab@.:+-() 0123456789DEGB"), max_size=60))
def test_masking_twice_changes_nothing_more(text):
    once = PII().edit(Document(text))
    assert not any(PII().scores(once).values()) or PII().edit(once).text != once.text

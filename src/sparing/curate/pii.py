"""Masks what points to a person: e-mail and IP addresses, telephone, card and bank account numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import ClassVar

from sparing.curate.document import Document
from sparing.curate.filters import Scores

IBAN_LENGTHS = """AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 FR27
GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19
MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24
XK20""".split()
"""Countries and the lengths of their account numbers (SWIFT's IBAN registry)."""

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9][A-Za-z0-9._%+\-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}\b"
)
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")  # 2000::/3, all that is routed
_PHONE = re.compile(
    r"(?<![\w.+\-])(?:\+\d{1,3}(?:[ .\-]?\(?\d{1,4}\)?){2,6}"  # with the country's code
    r"|(?:1[ .\-])?(?:\([2-9]\d\d\)[ .\-]?|[2-9]\d\d[.\-])[2-9]\d\d[ .\-]\d{4})(?!\w|[.\-]\d)"  # as North America writes them
)
_CARD = re.compile(r"(?<![\w+\-])(?<!\d[.,])[2-6](?:[ \-]?\d){11,18}(?![\w\-]|[.,]\d)")
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720))\d+|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}|(?:5[0678]|6\d)\d{10,17}"
)
"""Visa, Mastercard, American Express, Diners, JCB, Discover, UnionPay, Maestro."""
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])(?=[A-Z]{2}\d\d)(?:"
    + "|".join(f"{one[:2]}\\d\\d(?: ?[A-Z0-9]){{{int(one[2:]) - 4}}}" for one in IBAN_LENGTHS)
    + r")(?![A-Za-z0-9])"
)
_LONG_NUMBER = re.compile(r"\d[\d ().:\-]{5,}\d")
"""What every number below begins with, but for IPv6 and IBAN."""


def luhn(number: str) -> bool:
    """Whether the last digit of a card number is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(char) for char in reversed(number)]
    return sum(digits[::2] + [digit // 5 + 2 * digit % 10 for digit in digits[1::2]]) % 10 == 0


def iban(number: str) -> bool:
    """Whether the check digits of an account number are right (ISO 13616: 1 modulo 97)."""
    bare = number.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in bare[4:] + bare[:4])) % 97 == 1


def card(number: str) -> bool:
    """Whether an issuer gives such numbers, and the check digit is right."""
    bare = re.sub(r"\D", "", number)
    return _ISSUERS.fullmatch(bare) is not None and luhn(bare)


def public_address(text: str) -> bool:
    """Whether this is an IP address that the internet routes. Those of private networks and of examples point to nobody."""
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def phone(number: str) -> bool:
    """Whether there are as many digits as telephone numbers have (ITU-T E.164)."""
    return 8 <= sum(map(str.isdigit, number)) <= 15


@dataclass(frozen=True)
class PII:
    """Masks personal data; rejects nothing. A field is what stands in its place; None leaves it as it is.

    Telephone numbers are found with a country's code, or as North America writes them; cards by issuer and check digit (Luhn), bank
    accounts by country, length and check digits (IBAN). E-mail and IP addresses become ones that are reserved for examples, as FineWeb's
    do (datatrove, pii.py), always the same ones.
    """

    name: ClassVar[str] = "pii"

    email: str | None = "email@example.com"
    ip: str | None = "192.0.2.1"
    phone: str | None = "[phone number]"
    card: str | None = "[card number]"
    iban: str | None = "[IBAN]"

    def scores(self, document: Document) -> Scores:
        """How many of each kind are masked."""
        text, counts = self._masked(document.text)
        document.memo[self] = text
        return counts

    def verdict(self, scores: Scores) -> str | None:
        return None

    def edit(self, document: Document) -> Document:
        """The document with its personal data masked."""
        if self not in document.memo:
            self.scores(document)
        return document.edited(document.memo.pop(self))

    def _masked(self, text: str) -> tuple[str, Scores]:
        counts: Scores = dict.fromkeys(("emails", "ips", "phones", "cards", "ibans"), 0)

        def mask(kind: str, pattern: re.Pattern, mask: str | None, valid: Callable[[str], bool]) -> None:
            def replaced(match: re.Match) -> str:
                if match[0] == mask or not valid(match[0]):
                    return match[0]
                counts[kind] += 1
                return mask

            nonlocal text
            if mask is not None:
                text = pattern.sub(replaced, text)

        if "@" in text:
            mask("emails", _EMAIL, self.email, lambda address: True)
        mask("ibans", _IBAN, self.iban, iban)
        if _LONG_NUMBER.search(text):
            mask("cards", _CARD, self.card, card)
            mask("ips", _IP4, self.ip, public_address)
            mask("phones", _PHONE, self.phone, phone)
        if text.count(":") > 1:
            mask("ips", _IP6, self.ip, public_address)
        return text, counts

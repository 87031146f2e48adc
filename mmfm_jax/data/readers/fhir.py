"""FHIR R4 and R5 JSON: bundles, single resources and NDJSON, as people, rows of a table and coded events.

Only what is asked for leaves a resource. Identifiers and names do so to join and to be found in report text; they are
never stored (https://hl7.org/fhir/R4/: Patient, Observation, Condition, DiagnosticReport).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfm_jax.data.moment import moment
from mmfm_jax.data.readers.events import Event, EventFile, matches
from mmfm_jax.data.readers.table import Row
from mmfm_jax.data.refuse import Refused

_FILE_BYTES = 512 * 2**20
"""Of a bundle, which is read whole; NDJSON is read by the line, of at most as much."""
_WITHDRAWN = {"entered-in-error", "cancelled", "refuted"}
Resource = dict[str, Any]


@dataclass
class People:
    """Who the Patient resources of some files are."""

    system: str = ""
    """Of the identifier that other sources use; empty for the id of the resource."""
    identifiers: dict[str, str] = field(default_factory=dict)
    """By reference (`Patient/ID`, or the full URL of the bundle's entry): the identifier; empty when two resources of
    one reference differ in it."""
    names: dict[str, set[str]] = field(default_factory=dict)
    """By that identifier: names of the person."""
    contacts: dict[str, set[str]] = field(default_factory=dict)
    """By that identifier: addresses, telephones, e-mails and other identifiers."""

    def add(self, url: str, patient: Resource) -> None:
        identifier = identifier_of(patient, self.system)
        if not identifier:
            return
        for reference in {f"Patient/{patient.get('id')}", _reference(url)} - {""}:
            if self.identifiers.setdefault(reference, identifier) != identifier:
                self.identifiers[reference] = ""
        names, contacts = self.names.setdefault(identifier, set()), self.contacts.setdefault(identifier, set())
        related = [one for one in _list(patient.get("contact")) if isinstance(one, dict)]
        for person in (patient, *related):
            for name in [*_list(person.get("name")), *_list(person.get("additionalName"))]:
                names.update(_words(name, ("text", "family", "given", "suffix")))
            for address in _list(person.get("address")):
                contacts.update(_words(address, ("text", "line", "city", "district", "postalCode")))
            for telecom in _list(person.get("telecom")):
                contacts.update(_words(telecom, ("value",)))
        for other in _list(patient.get("identifier")):
            contacts.update(_words(other, ("value",)))

    def of(self, reference: str) -> str:
        """Identifier of the patient whom a reference means; empty when it is not known."""
        plain = "" if self.system or not reference.startswith("Patient/") else reference.removeprefix("Patient/")
        return self.identifiers.get(reference, plain)


def about(resource: Resource) -> str:
    """Reference to the patient whom a resource is about; empty when it names none."""
    if resource.get("resourceType") == "Patient":
        return f"Patient/{resource.get('id')}"
    subject = _dict(resource.get("subject") or resource.get("patient"))
    return _reference(str(subject.get("reference") or ""))


def resources(path: Path, only: str = "") -> Iterator[tuple[str, Resource | Refused]]:
    """(full URL or "", resource) of every resource in a file; a line that is none is Refused.

    `only`: a type; lines of NDJSON that cannot be of it are passed over unread. Raises Refused when the file as a whole
    cannot be read.
    """
    try:
        if path.suffix.lower() == ".ndjson":
            wanted = f'"{only}"'.encode() if only else b""
            with path.open("rb") as file:
                while line := file.readline(_FILE_BYTES):
                    if line.strip() and wanted in line:
                        yield from _parsed(line)
        elif path.stat().st_size > _FILE_BYTES:
            raise Refused("too_large", f"a bundle of more than {_FILE_BYTES // 2**20} MiB; export it as NDJSON")
        else:
            for url, one in _parsed(path.read_bytes()):
                if isinstance(one, Refused):
                    raise one
                yield url, one
    except OSError:
        raise Refused("unreadable", "it cannot be read") from None


def _parsed(data: bytes) -> Iterator[tuple[str, Resource | Refused]]:
    try:
        held = json.loads(data)
        if not (isinstance(held, dict) and isinstance(held.get("resourceType"), str)):
            raise ValueError
    except (ValueError, RecursionError):
        yield "", Refused("damaged", "it is not a FHIR resource in JSON")
        return
    if held["resourceType"] != "Bundle":
        yield "", held
        return
    for entry in _list(held.get("entry")):
        inner = _dict(_dict(entry).get("resource"))
        if isinstance(inner.get("resourceType"), str):
            yield str(_dict(entry).get("fullUrl") or ""), inner


def people(paths: Iterable[Path], system: str) -> People:
    """Everyone of whom there is a Patient resource; files that cannot be read are passed over."""
    found = People(system)
    for path in paths:
        try:
            for url, one in resources(path, "Patient"):
                if not isinstance(one, Refused) and one["resourceType"] == "Patient":
                    found.add(url, one)
        except Refused:
            continue
    return found


# ---------------------------------------------------------------- rows of a table


def rows(path: Path, resource: str, who: People, study_system: str) -> Iterator[Row | Refused]:
    """A row of each Patient or DiagnosticReport in a file. Raises Refused when the file cannot be read."""
    for _, one in resources(path, resource):
        if isinstance(one, Refused):
            yield one
        elif one["resourceType"] == resource:
            try:
                yield _patient(one, who) if resource == "Patient" else _report(one, who, study_system)
            except Refused as why:
                yield why


def _patient(one: Resource, who: People) -> Row:
    dead = bool(one.get("deceasedBoolean")) or "deceasedDateTime" in one
    said = dead or "deceasedBoolean" in one
    return {
        "patient": who.of(about(one)),
        "birth_date": str(one.get("birthDate") or ""),
        "gender": str(one.get("gender") or ""),
        "deceased": str(dead).lower() if said else "",
    }


def _report(one: Resource, who: People, study_system: str) -> Row:
    if str(one.get("status")) in _WITHDRAWN:
        raise Refused("withdrawn", "its status says that it does not hold")
    texts, other = [], 0
    for form in _list(one.get("presentedForm")):
        attachment = _dict(form)
        kind = str(attachment.get("contentType") or "").partition(";")
        if kind[0].strip().lower() != "text/plain" or not attachment.get("data"):
            other += 1
            continue
        charset = kind[2].strip().lower().removeprefix("charset=").strip('"') or "utf-8"
        try:
            texts.append(base64.b64decode(str(attachment["data"]), validate=True).decode(charset).strip())
        except (binascii.Error, ValueError, LookupError):
            raise Refused("damaged", "its attachment is not text in base64") from None
    conclusion = str(one.get("conclusion") or "").strip()
    if other and not (texts or conclusion):
        raise Refused("unsupported", f"its text is in {other} attachments that are not text/plain, or lie elsewhere")
    patient = who.of(about(one))
    for doctor in (*_list(one.get("performer")), *_list(one.get("resultsInterpreter"))):
        who.names.setdefault(patient, set()).update(_words(doctor, ("display",)))
    return {
        "patient": patient,
        "study": identifier_of(one, study_system),
        "time": _time(one),
        "code": next(iter(_codings(one.get("code"))), ""),
        "text": "\n\n".join(text for text in texts if text),
        "conclusion": conclusion,
    }


# ---------------------------------------------------------------- events


def read_events(path: Path, wanted: Iterable[str]) -> EventFile:
    """The Observations (their components too) and Conditions of a file that have a wanted code.

    Patients are references, for `People.of`. Raises Refused when the file cannot be read.
    """
    wanted = tuple(wanted)
    found = EventFile()
    for _, one in resources(path):
        if isinstance(one, Refused):
            found.left_out[one.reason] += 1
            continue
        patient = about(one)
        if patient:
            found.patients.add(patient)
        if one["resourceType"] not in ("Observation", "Condition"):
            continue
        for part in (one, *map(_dict, _list(one.get("component")))):
            codes = [c for coding in _codings(part.get("code")) for c in (coding, coding.rpartition("|")[2])]
            if not any(matches(code, wanted) for code in codes):
                continue
            if str(one.get("status")) in _WITHDRAWN or set(_codings(one.get("verificationStatus"), True)) & _WITHDRAWN:
                found.left_out["withdrawn"] += 1
            elif not patient:
                found.left_out["no_patient"] += 1
            else:
                value, text, unit = _value(part)
                found.events.append(Event(patient, tuple(codes), moment(_time(one)), value, text, unit))
    return found


def _value(part: Resource) -> tuple[float | None, str, str]:
    """Number, text and unit of an Observation or a component; (None, "", "") where there is no value."""
    if isinstance(held := part.get("valueQuantity"), dict):
        unit = str(held.get("code") or held.get("unit") or "")
        number = held.get("value")
        return None if held.get("comparator") else _float(number), "", unit
    if "valueInteger" in part:
        return _float(part["valueInteger"]), "", ""
    if isinstance(held := part.get("valueCodeableConcept"), dict):
        codings = list(_codings(held, True))
        return None, codings[0] if codings else str(held.get("text") or ""), ""
    if isinstance(held := part.get("valueBoolean"), bool):
        return None, str(held).lower(), ""
    return None, str(part.get("valueString") or ""), ""


def _float(number: Any) -> float | None:
    if not isinstance(number, int | float) or isinstance(number, bool):
        return None
    try:
        return float(number)
    except OverflowError:
        return None


# ---------------------------------------------------------------- pieces of resources


def identifier_of(resource: Resource, system: str) -> str:
    """The identifier of a system, or the resource's id when no system is asked for; empty when it has none."""
    if not system:
        return str(resource.get("id") or "")
    held = (_dict(one) for one in _list(resource.get("identifier")))
    return next((str(one["value"]) for one in held if one.get("system") == system and one.get("value")), "")


def _time(one: Resource) -> str:
    for key in ("effectiveDateTime", "effectiveInstant", "onsetDateTime", "effectivePeriod", "onsetPeriod"):
        if held := one.get(key):
            return str(_dict(held).get("start") or "") if key.endswith("Period") else str(held)
    return str(one.get("issued") or one.get("recordedDate") or "")


def _codings(concept: Any, bare: bool = False) -> Iterator[str]:
    """`system|code` of each coding of a CodeableConcept; `bare`: the code alone."""
    for coding in map(_dict, _list(_dict(concept).get("coding"))):
        if code := coding.get("code"):
            yield str(code) if bare or not coding.get("system") else f"{coding['system']}|{code}"


def _reference(text: str) -> str:
    """`Patient/ID` of a relative or absolute reference, without its version; a URN as it is."""
    if text.startswith("urn:"):
        return text
    return "/".join(text.partition("/_history/")[0].rstrip("/").split("/")[-2:])


def _words(held: Any, keys: Iterable[str]) -> set[str]:
    values = (value for key in keys for value in _list(_dict(held).get(key)))
    return {str(value) for value in values if isinstance(value, str | int)}


def _list(held: Any) -> list:
    return held if isinstance(held, list) else [] if held is None else [held]


def _dict(held: Any) -> dict:
    return held if isinstance(held, dict) else {}

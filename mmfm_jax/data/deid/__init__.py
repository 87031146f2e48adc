"""De-identification.

In come headers, identifiers, dates and reports; out come pseudonyms, shifted days and scrubbed texts, all of it a
function of the key and the input.
"""

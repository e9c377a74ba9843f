"""How much the arms of a study differ from its reference arm, and how certain that is: tables in, tables out."""

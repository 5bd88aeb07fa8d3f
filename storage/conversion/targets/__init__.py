"""The formats that a conversion writes."""

"""The files a non-uniform checkpoint carries: self-contained, copied as they are, no saap needed."""

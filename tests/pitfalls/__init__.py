"""Known mistakes with these architectures, at least one test for each, which fails when the mistake is made.

The numbers are those of the list of pitfalls that the project keeps: 46 in all, each in the file of its family. A test
plants the mistake and shows that the reference outputs tell it apart, or shows a number that only the right reading gives.
"""

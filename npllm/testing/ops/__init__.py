"""The operations of the kit, a family a file: signature, budget, cases and known mistakes of each."""

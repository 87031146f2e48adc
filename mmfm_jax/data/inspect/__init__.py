"""What a store holds, told to a person.

In comes a store of any size, of which a bounded part is read; out come a text for the terminal and `inspect.html`.
"""

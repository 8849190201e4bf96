"""The reference semantics of `select`: which stored tokens a query reads, and attention over them."""

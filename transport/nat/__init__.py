"""What a node knows of the way the outside sees it, and what it does for others who ask.

`facts` is the vocabulary and the judgement, `classifier` collects the evidence from members,
`answering`, `responder` and `observation` are what a member answers with, `mapping` asks the
router for a port, `address_watch` notices when all of it is out of date, and `service` puts them
together for one `Mesh`. Nothing here makes a path to a peer.
"""

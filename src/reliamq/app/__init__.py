"""The application object: what users make one of.

It keeps what was registered and wires settings, backend, publisher, worker and relay together.  It has no logic of its
own: every promise is kept in a capability below it.
"""

from reliamq.app.application import Reliamq as Reliamq

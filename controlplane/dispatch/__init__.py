"""Between the services and the data planes: sessions, the dispatcher that drives the scheduler, streams of output."""

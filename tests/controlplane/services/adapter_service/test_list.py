"""Lists: filters, order, pages, and what is refused."""

import base64
from typing import Any

from protos.planes import AdapterPlace
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served


def test_lists_are_filtered_ordered_and_paged(run: Run) -> None:
    async def scenario(s: Served) -> None:
        for n in range(5):
            await s.register(f"a{n}", n, labels={"parity": "odd" if n % 2 else "even"}, pinned=n == 3)
        digest = (await s.register("b", 9)).current.version
        s.control.move(digest, AdapterPlace.DEVICE)

        async def names(**fields: Any) -> list[str]:
            return [a.name for a in (await s.list(**fields)).adapters]

        assert await names() == ["a0", "a1", "a2", "a3", "a4", "b"]
        assert await names(order_by="name desc") == ["b", "a4", "a3", "a2", "a1", "a0"]
        assert await names(order_by="create_time desc") == ["b", "a4", "a3", "a2", "a1", "a0"]
        await s.update("a0", ["labels"], labels={"parity": "even", "x": "y z"})
        assert (await names(order_by="update_time"))[-1] == "a0"
        assert await names(filter="name:a AND label.parity=odd") == ["a1", "a3"]
        assert await names(filter="label.x=y z") == ["a0"]
        assert await names(filter="pinned=true") == ["a3"]
        assert await names(filter="state=READY") == ["b"]
        assert await names(filter="state=ADAPTER_STATE_READY AND module=q_proj AND rank>=4 AND rank<=4") == ["b"]
        assert await names(filter="module=k_proj") == []
        assert await names(filter="rank>=5") == []
        seen, token = [], ""
        while True:
            page = await s.list(page_size=2, order_by="name desc", filter="name:a", page_token=token)
            assert page.total_size == 5 and len(page.adapters) <= 2
            seen += [a.name for a in page.adapters]
            token = page.next_page_token
            if not token:
                break
            if len(seen) == 2:  # what comes and goes in between neither repeats nor hides others
                await s.unregister("a4")
                await s.register("a9", 4)
        assert seen == ["a4", "a3", "a2", "a1", "a0"]

    run(scenario)


# JSON that is not a page token's.
NO_TOKENS = (b"null", b"5", b"{}", b'["", "", 0]', b'["", "", 1e999, "a"]', b'["", "", 0, null]', b"[" * 20_000)


def test_malformed_lists_are_refused_by_field(run: Run) -> None:
    async def scenario(s: Served) -> None:
        for n in range(3):
            await s.register(f"a{n}", n)
        token = (await s.list(page_size=1)).next_page_token
        cases: list[tuple[str, dict[str, Any]]] = [
            ("page_size", {"page_size": 1001}),
            ("page_token", {"page_token": "!"}),
            ("page_token", {"page_token": "AAAA"}),
            *(("page_token", {"page_token": base64.b64encode(body).decode()}) for body in NO_TOKENS),
            ("page_token", {"page_token": "A" * (1 << 20)}),
            ("page_token", {"page_token": token, "order_by": "name desc"}),
            ("filter", {"filter": "colour=red"}),
            ("filter", {"filter": "name:a OR name:b"}),
            ("filter", {"filter": "state=HAPPY"}),
            ("filter", {"filter": "pinned=maybe"}),
            ("filter", {"filter": "name:" + "a" * 3000}),
            ("order_by", {"order_by": "size"}),
            ("order_by", {"order_by": "name up"}),
        ]
        for expected, fields in cases:
            with Refused(Code.INVALID_ARGUMENT) as refusal:
                await s.list(**fields)
            assert refusal.fields == [expected], fields

    run(scenario)

//! The shortcut: requests on keys go past the router.
//!
//! The router finds a service by its path, copies it, and boxes bodies and futures at each of its layers, and nearly all requests are on
//! keys. Invariant: both ways have the same layers around the service. Absent: other services; what is asked of them is rare, or a
//! long stream.

use std::convert::Infallible;
use std::task::{Context, Poll, ready};

use axum::http::{Request, Response};
use futures_util::future::{Either, MapOk, TryFutureExt as _};
use tower::{Layer, Service};

use crate::http::is_grpc;
use crate::pb::etcd::kv_server::SERVICE_NAME;

fn is_on_keys(path: &str) -> bool {
    path.strip_prefix('/')
        .and_then(|path| path.strip_prefix(SERVICE_NAME))
        .is_some_and(|method| method.starts_with('/'))
}

/// Sends requests on keys to `K`, and all others to what it is the layer of.
#[derive(Clone)]
pub(super) struct Shortcut<K>(pub K);

impl<K: Clone, S> Layer<S> for Shortcut<K> {
    type Service = Fork<K, S>;

    fn layer(&self, others: S) -> Fork<K, S> {
        Fork { keys: self.0.clone(), others }
    }
}

#[derive(Clone)]
pub(super) struct Fork<K, S> {
    keys: K,
    others: S,
}

/// An answer's body of one way or the other.
type Body<L, R> = http_body_util::Either<L, R>;
type Way<F, L, R, A> = MapOk<F, fn(Response<A>) -> Response<Body<L, R>>>;

impl<K, S, B, L, R> Service<Request<B>> for Fork<K, S>
where
    K: Service<Request<B>, Response = Response<L>, Error = Infallible>,
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
{
    type Response = Response<Body<L, R>>;
    type Error = Infallible;
    type Future = Either<Way<K::Future, L, R, L>, Way<S::Future, L, R, R>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        ready!(self.keys.poll_ready(cx))?;
        self.others.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // What is not gRPC's goes the long way, where it is refused.
        if is_on_keys(request.uri().path()) && is_grpc(request.version(), request.headers()) {
            Either::Left(self.keys.call(request).map_ok(|response| response.map(Body::Left)))
        } else {
            Either::Right(self.others.call(request).map_ok(|response| response.map(Body::Right)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Ready, ready};

    use axum::http::Version;
    use http_body_util::{BodyExt as _, Full};

    use super::*;

    /// Answers with its name.
    #[derive(Clone)]
    struct Named(&'static str);

    impl Service<Request<()>> for Named {
        type Response = Response<Full<bytes::Bytes>>;
        type Error = Infallible;
        type Future = Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            ready(Ok(Response::new(Full::from(self.0))))
        }
    }

    #[tokio::test]
    async fn requests_on_keys_and_no_others_go_past_the_router() {
        let mut fork = Shortcut(Named("keys")).layer(Named("router"));
        for (path, way) in [
            ("/etcdserverpb.KV/Put", "keys"),
            ("/etcdserverpb.KV/NoSuchMethod", "keys"),
            ("/etcdserverpb.KV", "router"),
            ("/etcdserverpb.KVs/Put", "router"),
            ("/etcdserverpb.Lease/LeaseGrant", "router"),
            ("/v3/kv/put", "router"),
            ("/", "router"),
        ] {
            for (kind, way) in [("application/grpc+proto", way), ("text/plain", "router")] {
                for (version, way) in [(Version::HTTP_2, way), (Version::HTTP_11, "router")] {
                    let request = Request::builder().version(version).uri(path).header("content-type", kind);
                    let answer = fork.call(request.body(()).unwrap()).await.unwrap().into_body().collect().await;
                    assert_eq!(answer.unwrap().to_bytes(), way, "{path} {kind} {version:?}");
                }
            }
        }
    }
}

use tonic::body::Body;
use tonic::codegen::http::Request;
use tonic::transport::Server;
use tower::layer::util::{Identity, Stack};
use tower::util::MapRequestLayer;

use super::run::with_called_path;
use crate::trace::server_span;

/// Layers that [`server`] applies to every request.
pub type Called = Stack<MapRequestLayer<fn(Request<Body>) -> Request<Body>>, Identity>;

/// A server whose guards see the called method, and whose calls run in a span of their caller's trace.
#[must_use]
pub fn server() -> Server<Called> {
    Server::builder()
        .trace_fn(server_span)
        .layer(MapRequestLayer::new(with_called_path as fn(Request<Body>) -> Request<Body>))
}

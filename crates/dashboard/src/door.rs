//! Who may ask: checks of the request's headers before anything else, and the headers of every answer.

use axum::body::Body;
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Response, StatusCode};

use crate::key::Key;

/// Only the page's own files run, only its own host is asked, and nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// Whether the request names this machine. A page of another site that made its own name resolve to 127.0.0.1 (DNS
/// rebinding) names that, and is refused. The port is not compared, because tunnels change it.
pub(crate) fn is_local_host(headers: &HeaderMap) -> bool {
    let Some(Ok(host)) = headers.get(header::HOST).map(HeaderValue::to_str) else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(name, _)| name),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || matches!(name, "127.0.0.1" | "::1")
}

/// Whether a page of another origin sends the request, as browsers say. Pages of other ports of this machine are
/// "same-site", and get its cookies with their requests, so they are refused here.
pub(crate) fn is_of_other_origin(headers: &HeaderMap) -> bool {
    let said = headers.get("sec-fetch-site");
    said.is_some_and(|site| site != "same-origin" && site != "none")
}

/// Seconds that the caller's token is still valid for: that of `Authorization: Bearer`, else that of the cookie.
pub(crate) fn authorised(headers: &HeaderMap, key: &Key, cookie: &str) -> Option<u64> {
    if let Some(given) = headers.get(header::AUTHORIZATION) {
        return key.check(given.to_str().ok()?.strip_prefix("Bearer ")?);
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find_map(|(name, value)| if name == cookie { key.check(value) } else { None })
}

/// The cookie that signs a browser in. Scripts cannot read it, and no other site's page sends it.
pub(crate) fn set_cookie(name: &str, token: &str, seconds: u64) -> String {
    format!("{name}={token}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}")
}

/// Adds the headers that every answer has.
pub(crate) fn seal(response: &mut Response<Body>) {
    const HEADERS: [(HeaderName, &str); 6] = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Data of a run must not stay on disk in a browser's cache; files of the page say otherwise themselves.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

/// An answer of plain text.
pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(Body::from(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_answered() {
        let host = |name: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(name).unwrap());
            is_local_host(&headers)
        };
        for ours in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:7701", "[::1]:9", "[::1]"] {
            assert!(host(ours), "{ours}");
        }
        for other in
            ["", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io:7701", "10.0.0.1", "[::2]", "[::1"]
        {
            assert!(!host(other), "{other}");
        }
        assert!(!is_local_host(&HeaderMap::new()));
    }
}

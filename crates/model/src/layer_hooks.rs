//! What happens between the parts of a pass, for weights that are not all in place and gradients that leave early.

use std::convert::Infallible;

/// Called around the buckets of a pass ([`Bucket`](pacs_shape::Bucket)): a forward uses them in order, a backward in the
/// opposite order.
pub trait LayerHooks {
    /// Why a bucket cannot be used; ends the pass.
    type Error;

    /// The forward, or a computation of the layer again, is about to use the weights of a bucket.
    ///
    /// # Errors
    /// When they cannot be brought in.
    fn before_forward(&mut self, bucket: usize) -> Result<(), Self::Error>;

    /// The backward is about to use the weights of a bucket, and to add to its gradients.
    ///
    /// # Errors
    /// When there is no place for them.
    fn before_backward(&mut self, bucket: usize) -> Result<(), Self::Error>;

    /// The gradients of a bucket are complete as far as this pass goes.
    ///
    /// # Errors
    /// When they cannot be handed over.
    fn after_backward(&mut self, bucket: usize) -> Result<(), Self::Error>;
}

/// All weights are in place, and gradients stay where they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl LayerHooks for NoHooks {
    type Error = Infallible;

    fn before_forward(&mut self, _bucket: usize) -> Result<(), Infallible> {
        Ok(())
    }

    fn before_backward(&mut self, _bucket: usize) -> Result<(), Infallible> {
        Ok(())
    }

    fn after_backward(&mut self, _bucket: usize) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The hooks of a forward over `buckets` without its computation: what a rank does that has nothing to compute while
/// others do.
///
/// # Errors
/// As the hooks.
pub fn idle_forward<S: LayerHooks>(buckets: usize, hooks: &mut S) -> Result<(), S::Error> {
    (0..buckets).try_for_each(|bucket| hooks.before_forward(bucket))
}

/// The hooks of a backward over `buckets` without its computation.
///
/// # Errors
/// As the hooks.
pub fn idle_backward<S: LayerHooks>(buckets: usize, hooks: &mut S) -> Result<(), S::Error> {
    (0..buckets).rev().try_for_each(|bucket| {
        hooks.before_backward(bucket)?;
        hooks.after_backward(bucket)
    })
}

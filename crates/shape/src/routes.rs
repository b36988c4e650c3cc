//! How the experts of tokens are recorded: as bytes, so that a sample carries them through messages and the journal.

use crate::{Experts, ModelConfig};

/// Most experts of a layer that two bytes can number.
const MOST_EXPERTS: usize = 1 << 16;
/// Most experts of a layer that one byte can number.
const MOST_IN_A_BYTE: usize = 1 << 8;

/// The layout of recorded routes. A token takes [`RouteShape::token_bytes`]: for each layer with experts, from the first on, the
/// numbers of the token's experts in the order in which their outputs are summed, the most probable first. A number takes one byte;
/// where a layer has more than 256 experts it takes two, the lower one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteShape {
    mixtures: usize,
    per_token: usize,
    experts: usize,
}

impl RouteShape {
    /// The layout for a model; `None` for a dense one, and for layers with more than 65,536 experts.
    #[must_use]
    pub fn of(config: &ModelConfig) -> Option<Self> {
        let mixtures = (0..config.layers).filter(|layer| config.experts_of(*layer).is_some()).count();
        Self::new(mixtures, config.experts.as_ref()?)
    }

    /// The layout for so many layers with experts of these sizes; `None` as [`RouteShape::of`].
    #[must_use]
    pub fn new(mixtures: usize, sizes: &Experts) -> Option<Self> {
        let [per_token, experts] = [sizes.per_token, sizes.count].map(|size| usize::try_from(size).unwrap_or(0));
        let fits = mixtures > 0 && (1..=experts).contains(&per_token) && experts <= MOST_EXPERTS;
        fits.then_some(Self { mixtures, per_token, experts })
    }

    /// Number of layers with experts.
    #[must_use]
    pub fn mixtures(&self) -> usize {
        self.mixtures
    }

    /// Experts that compute a token in each of those layers.
    #[must_use]
    pub fn per_token(&self) -> usize {
        self.per_token
    }

    /// Experts of each of those layers.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Bytes of the routes of one token.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.mixtures * self.per_token * self.number_bytes()
    }

    fn number_bytes(&self) -> usize {
        if self.experts > MOST_IN_A_BYTE { 2 } else { 1 }
    }

    /// Appends the experts of one token in one layer to `bytes`.
    pub fn write(&self, experts: &[i64], bytes: &mut Vec<u8>) {
        let width = self.number_bytes();
        for expert in experts {
            bytes.extend_from_slice(&expert.to_le_bytes()[..width]);
        }
    }

    /// The experts of all tokens in layer `mixture` of those with experts, [`RouteShape::per_token`] numbers a token.
    ///
    /// # Panics
    /// When there is no such layer.
    #[must_use]
    pub fn read(&self, bytes: &[u8], mixture: usize) -> Vec<i64> {
        assert!(mixture < self.mixtures, "layer {mixture} of {} with experts", self.mixtures);
        let width = self.per_token * self.number_bytes();
        let tokens = bytes.chunks_exact(self.token_bytes());
        let of_layer = tokens.map(|token| &token[mixture * width..][..width]);
        of_layer.flat_map(|numbers| self.numbers(numbers)).map(|number| number as i64).collect()
    }

    fn numbers<'b>(&self, bytes: &'b [u8]) -> impl Iterator<Item = usize> + use<'b> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0usize, |number, byte| number << 8 | usize::from(*byte));
        bytes.chunks_exact(self.number_bytes()).map(number)
    }

    /// Checks that `bytes` are the routes of so many tokens, and name no expert that a layer does not have: libtorch would read
    /// beyond its matrices.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence about the routes.
    pub fn check_range(&self, bytes: &[u8], tokens: usize) -> Result<(), String> {
        let expected = tokens.saturating_mul(self.token_bytes());
        if bytes.len() != expected {
            return Err(format!("take {} bytes, expected {expected} for {tokens} tokens", bytes.len()));
        }
        // The maximum of bytes is found many at a time, which the general way is not.
        let largest = match self.number_bytes() {
            1 => bytes.iter().copied().max().map(usize::from),
            _ => self.numbers(bytes).max(),
        };
        match largest.filter(|largest| *largest >= self.experts) {
            Some(largest) => Err(format!("name expert {largest}, and a layer has {}", self.experts)),
            None => Ok(()),
        }
    }

    /// Checks the same, and that no token has an expert twice in a layer.
    ///
    /// # Errors
    /// As [`RouteShape::check_range`].
    pub fn check(&self, bytes: &[u8], tokens: usize) -> Result<(), String> {
        self.check_range(bytes, tokens)?;
        // The last turn in which each expert was named, so that nothing is cleared between two turns.
        let mut named = vec![0usize; self.experts];
        for (turn, experts) in (1..).zip(bytes.chunks_exact(self.per_token * self.number_bytes())) {
            for expert in self.numbers(experts) {
                if std::mem::replace(&mut named[expert], turn) == turn {
                    return Err(format!("name expert {expert} twice for one token of a layer"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(mixtures: usize, per_token: i64, count: i64) -> Option<RouteShape> {
        RouteShape::new(mixtures, &Experts { count, per_token, ffn: 1, renormalises: true, dense_layers: Vec::new() })
    }

    #[test]
    fn layers_without_experts_take_no_bytes() {
        let read = |name: &str| ModelConfig::read(&crate::golden_models::folder().join(name)).unwrap();
        // Three layers, of which the second is dense; two of eight experts a token.
        assert_eq!(RouteShape::of(&read("qwen3_moe")), shape(2, 2, 8));
        assert_eq!(shape(2, 2, 8).unwrap().token_bytes(), 4);
        assert_eq!(RouteShape::of(&read("qwen3")), None);
        assert_eq!((shape(0, 2, 8), shape(1, 9, 8), shape(1, 0, 8)), (None, None, None));
        assert_eq!((shape(1, 2, 1 << 16).is_some(), shape(1, 2, (1 << 16) + 1)), (true, None));
        // Qwen3-30B-A3B.
        assert_eq!(shape(48, 8, 128).unwrap().token_bytes(), 384);
    }

    #[test]
    fn what_is_written_is_read_layer_by_layer() {
        for (experts, numbers) in
            [(256, [[0, 255], [7, 1], [9, 200], [3, 4]]), (257, [[256, 0], [1, 255], [2, 9], [40, 7]])]
        {
            let shape = shape(2, 2, experts).unwrap();
            let mut bytes = Vec::new();
            numbers.iter().for_each(|experts| shape.write(experts, &mut bytes));
            assert_eq!(bytes.len(), 2 * shape.token_bytes());
            assert_eq!(shape.check(&bytes, 2), Ok(()));
            let of_layer = |layer: usize| [numbers[layer], numbers[2 + layer]].concat();
            assert_eq!([0, 1].map(|layer| shape.read(&bytes, layer)), [0, 1].map(of_layer));
        }
    }

    #[test]
    fn routes_that_no_router_chooses_are_refused() {
        let narrow = shape(2, 2, 8).unwrap();
        let problem = |bytes: &[u8], tokens| narrow.check(bytes, tokens).unwrap_err();
        assert_eq!(narrow.check(&[0, 1, 7, 0], 1), Ok(()));
        assert_eq!(narrow.check(&[], 0), Ok(()));
        assert_eq!(problem(&[0, 1, 7], 1), "take 3 bytes, expected 4 for 1 tokens");
        assert_eq!(problem(&[0, 1, 7, 0], 2), "take 4 bytes, expected 8 for 2 tokens");
        assert!(problem(&[], usize::MAX).starts_with("take 0 bytes"), "no overflow");
        assert_eq!(problem(&[0, 1, 8, 0], 1), "name expert 8, and a layer has 8");
        assert_eq!(problem(&[0, 1, 7, 7], 1), "name expert 7 twice for one token of a layer");
        // The same expert in another layer, or for the next token, is no repetition.
        assert_eq!(narrow.check(&[0, 1, 1, 0, 0, 1, 1, 0], 2), Ok(()));
        assert_eq!(narrow.check_range(&[0, 1, 7, 7], 1), Ok(()), "the range alone");
        let wide = shape(1, 1, 300).unwrap();
        assert_eq!(wide.check(&[43, 1], 1), Ok(()));
        assert_eq!(wide.check(&[44, 1], 1).unwrap_err(), "name expert 300, and a layer has 300");
    }
}

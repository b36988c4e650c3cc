use crate::policy::mean;

macro_rules! fields {
    (sums { $($(#[$sum_doc:meta])* $sum:ident,)+ } maxima { $($(#[$max_doc:meta])* $max:ident,)+ }) => {
        /// Metrics of an objective, as sums and maxima that merge over sequences, updates and ranks.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct ObjectiveMetrics {
            $($(#[$sum_doc])* pub(crate) $sum: f64,)+
            $($(#[$max_doc])* pub(crate) $max: f64,)+
        }

        impl ObjectiveMetrics {
            /// Adds the sums and takes the maxima of `other`.
            pub fn merge(&mut self, other: &Self) {
                $(self.$sum += other.$sum;)+
                $(self.$max = self.$max.max(other.$max);)+
            }

            /// Returns all numbers, in the order of [`Self::from_slice`].
            #[must_use]
            pub fn to_vec(&self) -> Vec<f64> {
                vec![$(self.$sum,)+ $(self.$max,)+]
            }

            /// Rebuilds the metrics from [`Self::to_vec`]; missing numbers count as 0.
            #[must_use]
            pub fn from_slice(numbers: &[f64]) -> Self {
                let mut numbers = numbers.iter().copied();
                Self {
                    $($sum: numbers.next().unwrap_or(0.0),)+
                    $($max: numbers.next().unwrap_or(0.0),)+
                }
            }
        }
    };
}

fields! {
    sums {
        /// Tokens with a ratio of new to old probability.
        tokens,
        ratios,
        /// Logarithms of the ratios (nats).
        log_ratios,
        /// `ratio - 1 - log ratio`, the k3 estimate of the policy's divergence from the old one.
        excesses,
        /// Tokens whose loss is that of the clipped ratio.
        clipped,
        /// Tokens whose loss is that of the dual clip.
        dual_clipped,
        /// Truncated sequences that were masked out.
        masked,
        advantage_tokens,
        advantages,
        advantage_squares,
        importance_tokens,
        importance,
        importance_squares,
        /// Tokens whose importance weight the cap changed.
        importance_cut,
        reference_tokens,
        /// Estimates of the divergence from the reference (nats).
        reference_kl,
        value_tokens,
        /// Tokens whose value loss is that of the clipped value.
        value_clipped,
        /// Estimates of the value model at the start of the step.
        values,
        /// Returns that the value model is trained towards.
        returns,
        return_squares,
        /// Differences of returns and values.
        value_errors,
        value_error_squares,
    }
    maxima {
        ratio_max,
        advantage_max,
        importance_max,
    }
}

impl ObjectiveMetrics {
    /// Adds the log-ratios of one answer's tokens.
    pub(crate) fn add_ratios(&mut self, log_ratios: &[f64]) {
        for &x in log_ratios {
            self.ratios += x.exp();
            self.log_ratios += x;
            self.excesses += x.exp_m1() - x;
            self.ratio_max = self.ratio_max.max(x.exp());
        }
        self.tokens += log_ratios.len() as f64;
    }

    /// Adds one token's value at the start of the step, and its return.
    pub(crate) fn add_value(&mut self, value: f64, target: f64, clipped: bool) {
        let error = target - value;
        self.value_tokens += 1.0;
        self.value_clipped += f64::from(u8::from(clipped));
        self.values += value;
        self.returns += target;
        self.return_squares += target * target;
        self.value_errors += error;
        self.value_error_squares += error * error;
    }

    /// Returns the metrics by name, as `docs/METRICS.md` lists them. Those that nothing was added to are left out.
    #[must_use]
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let mut named = Vec::new();
        if self.tokens > 0.0 {
            named.extend([
                ("ratio_mean", mean(self.ratios, self.tokens)),
                ("ratio_max", self.ratio_max),
                ("policy_kl_k1", mean(-self.log_ratios, self.tokens)),
                ("policy_kl_k3", mean(self.excesses, self.tokens)),
            ]);
        }
        if self.advantage_tokens > 0.0 {
            let mean_advantage = mean(self.advantages, self.advantage_tokens);
            let variance = variance(self.advantages, self.advantage_squares, self.advantage_tokens);
            named.extend([
                ("ratio_clipped_share", mean(self.clipped, self.tokens)),
                ("ratio_dual_clipped_share", mean(self.dual_clipped, self.tokens)),
                ("advantage_mean", mean_advantage),
                ("advantage_std", variance.sqrt()),
                ("advantage_abs_max", self.advantage_max),
                ("masked_sequences", self.masked),
            ]);
        }
        if self.importance_tokens > 0.0 {
            named.extend([
                ("importance_mean", mean(self.importance, self.importance_tokens)),
                ("importance_max", self.importance_max),
                ("importance_cut_share", mean(self.importance_cut, self.importance_tokens)),
            ]);
        }
        if self.importance_squares > 0.0 {
            let effective = self.importance * self.importance / self.importance_squares;
            named.push(("importance_effective_share", effective / self.importance_tokens));
        }
        if self.reference_tokens > 0.0 {
            named.push(("reference_kl", mean(self.reference_kl, self.reference_tokens)));
        }
        if self.value_tokens > 0.0 {
            named.extend([
                ("value_clipped_share", mean(self.value_clipped, self.value_tokens)),
                ("value_mean", mean(self.values, self.value_tokens)),
                ("return_mean", mean(self.returns, self.value_tokens)),
            ]);
            let returns = variance(self.returns, self.return_squares, self.value_tokens);
            // Without variance in the returns there is nothing to explain.
            if returns > SMALLEST_VARIANCE {
                let errors = variance(self.value_errors, self.value_error_squares, self.value_tokens);
                named.push(("value_explained_variance", 1.0 - errors / returns));
            }
        }
        named
    }
}

/// Variances of returns below this are rounding errors.
const SMALLEST_VARIANCE: f64 = 1e-8;

fn variance(sum: f64, squares: f64, count: f64) -> f64 {
    let mean_value = mean(sum, count);
    (mean(squares, count) - mean_value * mean_value).max(0.0)
}
